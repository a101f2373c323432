"""Evaluate: draw the fixed held-out prompts and seeds with the new checkpoint, and score the images."""

from typing import Any

import numpy as np
from prefect import task

from d3po.tasks import mirroring
from d3po.tasks.scoring import SCORE_BATCH
from d3po.tasks.stage import STAGE_OPTIONS, model_turn, progress, scoring_turn
from d3po.tasks.tracking import delivery
from d3po_core.config import CampaignConfig
from d3po_core.evaluation.job import EVALUATE, held_out_path, held_out_seeds
from d3po_core.intervals import score_intervals
from d3po_core.processes.engine import run_job
from d3po_core.records import EvaluateRecord
from d3po_core.scorers.finding import load_scorers
from d3po_core.store.files import atomic_path
from d3po_core.store.images import diversity, load_pngs, sheet
from d3po_core.store.stages import checkpoint_path, finish_stage
from d3po_core.store.tables import table_from_rows, write_table

GRID_COLUMNS = 8


@task(name="evaluate", **STAGE_OPTIONS)
def evaluate_checkpoint(config: CampaignConfig, round_number: int) -> EvaluateRecord:
    """Draw and score the held-out images with the round's checkpoint; round 0 is the base model."""
    record = finish_stage(
        config.folder, round_number, "evaluate", EvaluateRecord, lambda: _evaluate(config, round_number)
    )
    mirroring.deliver(config)
    delivery.deliver(config)
    return record


def _evaluate(config: CampaignConfig, round_number: int) -> EvaluateRecord:
    seeds = held_out_seeds(config)
    with model_turn(config), progress(config, round_number, "evaluate", len(seeds), "image") as bar:
        drift = run_job(EVALUATE, config, round_number, bar.update)
    paths = [held_out_path(round_number, index) for index in range(len(seeds))]
    images = load_pngs([config.folder / path for path in paths])
    all_prompts = [seed.prompt for seed in seeds]
    with scoring_turn(config, config.evaluation_scorers):
        scorers = load_scorers(config, config.evaluation_scorers)
        batches = [slice(start, start + SCORE_BATCH) for start in range(0, len(images), SCORE_BATCH)]
        scores = {
            name: np.concatenate([scorer(images[batch], all_prompts[batch]) for batch in batches])
            for name, scorer in scorers.items()
        }
    rows: list[dict[str, Any]] = [
        {
            "sample_id": paths[i].stem, "prompt": seed.prompt, "seed": seed.noise_seed, "scorer": name,
            "score": float(scores[name][i]), "image_path": str(paths[i]), "checkpoint": checkpoint_path(round_number),
            "height": images.shape[1], "width": images.shape[2],
        }
        for name in scores
        for i, seed in enumerate(seeds)
    ]  # fmt: skip
    write_table(config.folder, "evaluations", round_number, table_from_rows("evaluations", rows))
    return EvaluateRecord(
        num_images=len(images),
        scores={name: score_intervals(values[None], all_prompts)[0] for name, values in scores.items()},
        grid=_grid(config, round_number, images),
        diversity=_diversity(config, images),
        drift=drift,
    )


def _diversity(config: CampaignConfig, images: np.ndarray) -> float | None:
    """How much the images of a held-out prompt differ, averaged over the prompts."""
    per_prompt = images.reshape(-1, config.evaluate.images_per_prompt, *images.shape[1:])
    return float(np.mean([diversity(of_prompt) for of_prompt in per_prompt])) if per_prompt.shape[1] > 1 else None


def _grid(config: CampaignConfig, round_number: int, images: np.ndarray) -> str:
    """Write the grid: one row per prompt, the same prompts and seeds in every round."""
    settings = config.evaluate
    columns = min(GRID_COLUMNS, settings.images_per_prompt)
    per_prompt = images.reshape(-1, settings.images_per_prompt, *images.shape[1:])
    # Spread the prompts over the file, since neighbours tend to be alike.
    stride = max(1, len(per_prompt) // settings.grid_prompts)
    chosen = per_prompt[::stride][: settings.grid_prompts, :columns]
    relative = f"images/round={round_number}/grid.png"
    with atomic_path(config.folder / relative) as temporary:
        sheet(list(chosen.reshape(-1, *images.shape[1:])), columns=columns, cell=96).save(temporary, format="PNG")
    return relative
