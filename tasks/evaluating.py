"""Evaluate: the fixed held-out prompts and seeds, drawn by the new checkpoint and scored."""

from typing import Any

import numpy as np
import torch
from prefect import task

from d3po_core.campaign import checkpoint_path, finish_stage
from d3po_core.comparison import diversity
from d3po_core.config import CampaignConfig
from d3po_core.evaluate import evaluation_seeds, summarize
from d3po_core.images import save_pngs, sheet
from d3po_core.policy import Policy
from d3po_core.prompts import load_prompts
from d3po_core.records import EvaluateRecord
from d3po_core.rollout import ImageSeed, draw_images, kl_from_base
from d3po_core.tables import atomic_path, table_from_rows, write_table
from tasks import tracking
from tasks.stage import STAGE_OPTIONS, gpu_turn, load_scorers, policy_at, progress, scoring_turn

GRID_COLUMNS = 8


@task(name="evaluate", **STAGE_OPTIONS)
def evaluate_checkpoint(config: CampaignConfig, round_number: int) -> EvaluateRecord:
    """Draw and score the held-out images with the round's checkpoint; round 0 is the base model."""
    record = finish_stage(
        config.folder, round_number, "evaluate", EvaluateRecord, lambda: _evaluate(config, round_number)
    )
    tracking.deliver(config)
    return record


def _evaluate(config: CampaignConfig, round_number: int) -> EvaluateRecord:
    policy = policy_at(config, round_number)
    settings = config.evaluate
    prompts = load_prompts(settings.prompts, settings.prompt_column, "evaluate.prompts")[: settings.max_prompts]
    seeds = evaluation_seeds(prompts, settings.images_per_prompt, config.seed)
    batches: list[np.ndarray] = []
    trajectories: list[torch.Tensor] = []
    with gpu_turn(policy.device.type), progress(config, round_number, "evaluate", len(seeds), "image") as bar:
        for start in range(0, len(seeds), config.sample.batch_size):
            batch = seeds[start : start + config.sample.batch_size]
            drawn, images = draw_images(policy, config.sample, batch, torch.float32)
            batches.append(images)
            trajectories.append(drawn.latents_BTCHW)
            bar.update(len(batch))
        drift = _drift(config, policy, seeds, torch.cat(trajectories))
    images = np.concatenate(batches)
    all_prompts = [seed.prompt for seed in seeds]
    with scoring_turn(config, config.evaluation_scorers):
        scorers = load_scorers(config, config.evaluation_scorers)
        scores = {name: scorer(images, all_prompts) for name, scorer in scorers.items()}
    ids = [f"r{round_number}-e{index}" for index in range(len(seeds))]
    paths = [f"images/round={round_number}/{sample_id}.png" for sample_id in ids]
    save_pngs(images, [config.folder / path for path in paths])
    rows: list[dict[str, Any]] = [
        {
            "sample_id": ids[i], "prompt": seed.prompt, "seed": seed.noise_seed, "scorer": name,
            "score": float(scores[name][i]), "image_path": paths[i], "checkpoint": checkpoint_path(round_number),
        }
        for name in scores
        for i, seed in enumerate(seeds)
    ]  # fmt: skip
    write_table(config.folder, "evaluations", round_number, table_from_rows("evaluations", rows))
    return EvaluateRecord(
        num_images=len(images),
        scores={name: summarize(values) for name, values in scores.items()},
        grid=_grid(config, round_number, images),
        diversity=_diversity(config, images),
        drift=drift,
    )


def _drift(config: CampaignConfig, policy: Policy, seeds: list[ImageSeed], latents_BTCHW: torch.Tensor) -> float | None:
    """Mean KL from the base over the trajectories of some held-out images, the same in every round."""
    wanted = min(config.evaluate.drift_images, len(seeds))
    if not wanted:
        return None
    chosen = np.linspace(0, len(seeds) - 1, wanted).round().astype(int).tolist()
    schedule = policy.schedule(config.sample.num_steps, config.sample.eta)
    parts = []
    for start in range(0, wanted, config.sample.batch_size):
        batch = chosen[start : start + config.sample.batch_size]
        prompts = [seeds[i].prompt for i in batch]
        parts.append(kl_from_base(policy, schedule, prompts, latents_BTCHW[batch], config.sample.guidance_scale))
    return float(torch.cat(parts).mean())


def _diversity(config: CampaignConfig, images: np.ndarray) -> float | None:
    """How much the images of one held-out prompt differ, mean over the prompts."""
    per_prompt = images.reshape(-1, config.evaluate.images_per_prompt, *images.shape[1:])
    return float(np.mean([diversity(of_prompt) for of_prompt in per_prompt])) if per_prompt.shape[1] > 1 else None


def _grid(config: CampaignConfig, round_number: int, images: np.ndarray) -> str:
    """One row a prompt, the same prompts and seeds in every round."""
    settings = config.evaluate
    columns = min(GRID_COLUMNS, settings.images_per_prompt)
    per_prompt = images.reshape(-1, settings.images_per_prompt, *images.shape[1:])
    # Prompts far apart in the file, since neighbours tend to be alike.
    stride = max(1, len(per_prompt) // settings.grid_prompts)
    chosen = per_prompt[::stride][: settings.grid_prompts, :columns]
    relative = f"images/round={round_number}/grid.png"
    with atomic_path(config.folder / relative) as temporary:
        sheet(chosen.reshape(-1, *images.shape[1:]), columns=columns, cell=96).save(temporary, format="PNG")
    return relative
