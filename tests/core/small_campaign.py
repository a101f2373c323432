"""A campaign of four rounds by hand: two groups of three images a round, two people, a proxy and an answer key."""

from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from d3po_core.config import CampaignConfig
from d3po_core.config_values import load_config
from d3po_core.preferences.deriving import derive_preferences
from d3po_core.records import EvaluateRecord, ScoreSummary
from d3po_core.store.campaign import begin_round, open_campaign
from d3po_core.store.stages import checkpoint_path, stage_path
from d3po_core.store.tables import SCHEMAS, connect, table_from_rows, write_table

ROUNDS = 4
MORNING = datetime(2024, 5, 1, 8)
PROXY = {"g0": (1.0, 0.0, 0.5), "g1": (0.5, 0.5, 0.5)}
# Held-out scores of prompts 'up' and 'down', two seeds each, in rounds 0 to 4.
UP = ((0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0), (1.0, 1.0))
DOWN = ((1.0, 0.0), (1.0, 1.0), (1.0, 1.0), (1.0, 1.0), (0.0, 0.5))


def said(rater: str, kind: str, sample_id: str, value: float | None, minute: int = 0, **changes: Any) -> dict[str, Any]:
    return {
        "rater": rater, "rater_kind": "human", "kind": kind, "sample_id": sample_id, "other_id": None, "value": value,
        "judged_at": MORNING + timedelta(minutes=minute), "source": "web", "seconds": 3.0, "position": None,
    } | changes  # fmt: skip


# What people said. Round 3: two against one, with an answer key. Round 4: all against the proxy, and a tie.
PEOPLE = {
    3: [
        said("ann", "choice", "r3-g0-m0", 1.0, other_id="r3-g0-m1", position=0),
        said("bob", "choice", "r3-g0-m1", 1.0, other_id="r3-g0-m0", position=1),
        said("cat", "choice", "r3-g0-m0", 1.0, other_id="r3-g0-m1", position=0),
        said("key", "choice", "r3-g0-m0", 1.0, other_id="r3-g0-m1", rater_kind="gold", source="gold", seconds=None),
    ],
    4: [
        said("ann", "choice", "r4-g0-m0", 1.0, 0, other_id="r4-g0-m1", position=0),
        said("ann", "choice", "r4-g0-m0", -1.0, 1, other_id="r4-g0-m1", position=0, seconds=5.0),  # changed her mind
        said("ann", "choice", "r4-g0-m2", None, 2, other_id="r4-g0-m0", position=1),  # skipped
        said("bob", "choice", "r4-g0-m1", 1.0, 3, other_id="r4-g0-m0", position=1),
        said("ann", "rating", "r4-g1-m0", 1.0, 4),
        said("ann", "rating", "r4-g1-m1", 0.0, 5),
        said("bob", "rank", "r4-g1-m0", 2.0, 6),
        said("bob", "rank", "r4-g1-m1", 1.0, 7),
    ],
}


# Blind comparisons of round 4 with the base: (rater, held-out image, value, where round 4's stood, minute).
COMPARED = [
    ("ann", 0, 1.0, 0, 0), ("ann", 1, -1.0, 1, 1), ("ann", 1, None, 1, 2), ("ann", 1, 1.0, 1, 3),
    ("ann", 2, -1.0, 0, 4), ("bob", 0, 0.0, 1, 5), ("bob", 3, None, 0, 6),
]  # fmt: skip


def small_config(folder: Path) -> CampaignConfig:
    sample = {"groups_per_round": 2, "group_size": 3, "num_steps": 2}
    evaluate = {"images_per_prompt": 2, "scorers": ["prompt_alignment"]}
    values = {"campaign": "small", "runs_dir": str(folder), "sample": sample, "evaluate": evaluate}
    return load_config(values, "test")


def write_campaign(folder: Path) -> Path:
    """Write the campaign into ``folder``; returns its folder."""
    config = small_config(folder)
    open_campaign(config)
    for number in range(ROUNDS + 1):
        begin_round(config, number)
        if number:
            _write_images(config.folder, number)
        if number == ROUNDS:
            _write_comparison(config.folder, number)
        _write_evaluation(config.folder, number)
        _write_round(config, number)
    return config.folder


def _write_images(campaign: Path, number: int) -> None:
    samples, judgements = [], [*PEOPLE.get(number, [])]
    for group, scores in PROXY.items():
        for member, score in enumerate(scores):
            sample_id = f"r{number}-{group}-m{member}"
            path = f"images/round={number}/{sample_id}.png"
            paint(campaign / path, seed=len(samples) + 10 * number)
            samples.append(
                {
                    "sample_id": sample_id, "group_id": f"r{number}-{group}", "member": member,
                    "prompt": f"prompt of {group}", "split": "train", "seed": member, "image_path": path,
                    "trajectory_path": f"trajectories/round={number}/shard-0000.safetensors",
                    "trajectory_row": len(samples), "checkpoint": checkpoint_path(number - 1),
                }
            )  # fmt: skip
            proxy = {"rater_kind": "proxy", "source": "proxy", "seconds": None}
            judgements.append(said("prompt_alignment", "score", sample_id, score, **proxy))
    write_table(campaign, "samples", number, table_from_rows("samples", samples))
    write_table(campaign, "judgements", number, table_from_rows("judgements", judgements))
    with connect(campaign) as connection:
        write_table(campaign, "preferences", number, derive_preferences(connection, number, "majority", "all").table)
    update = {
        "update": 0, "epoch": 0, "num_pairs": 3, "loss": 0.7, "margin_before": 0.1,
        "pair_accuracy_before": 0.6, "kl_before": 0.0, "clip_fraction": 0.0, "grad_norm": 1.0, "drowned": 0.0,
        "seconds": 1.0, "finished_at": MORNING,
    }  # fmt: skip
    write_table(campaign, "updates", number, table_from_rows("updates", [update]))
    names = ("update", "margin_before", "pair_accuracy_before", "kl_before", "clip_fraction")
    step = {name: update[name] for name in names} | {"step": 0, "timestep": 501}
    write_table(campaign, "update_steps", number, table_from_rows("update_steps", [step]))


def _write_evaluation(campaign: Path, number: int) -> None:
    rows = [
        {
            "sample_id": f"r{number}-e{2 * place + k}", "prompt": prompt, "seed": 100 + 2 * place + k,
            "scorer": "prompt_alignment", "score": scores[number][k], "checkpoint": checkpoint_path(number),
            "image_path": f"images/round={number}/r{number}-e{2 * place + k}.png",
        }
        for place, (prompt, scores) in enumerate((("up", UP), ("down", DOWN)))
        for k in range(2)
    ]  # fmt: skip
    write_table(campaign, "evaluations", number, table_from_rows("evaluations", rows))
    mean = sum(row["score"] for row in rows) / len(rows)
    summary = ScoreSummary(mean=mean, low=mean - 0.1, high=mean + 0.1)
    record = EvaluateRecord(num_images=len(rows), scores={"prompt_alignment": summary}, grid="")
    stage_path(campaign, number, "evaluate").write_text(record.model_dump_json())


def _write_comparison(campaign: Path, number: int) -> None:
    rows = [
        {
            "comparison": "0123456789abcdef", "against": 0, "rater": rater, "sample_id": f"r{number}-e{image}",
            "against_id": f"r0-e{image}", "value": value, "judged_at": MORNING + timedelta(minutes=minute),
            "seconds": 2.0, "position": position,
        }
        for rater, image, value, position, minute in COMPARED
    ]  # fmt: skip
    write_table(campaign, "comparisons", number, table_from_rows("comparisons", rows))


def _write_round(config: CampaignConfig, number: int) -> None:
    record = EvaluateRecord.model_validate_json(stage_path(config.folder, number, "evaluate").read_text())
    score = record.scores["prompt_alignment"]
    row = dict.fromkeys(SCHEMAS["rounds"].names) | {
        "checkpoint_in": checkpoint_path(max(number - 1, 0)), "checkpoint_out": checkpoint_path(number),
        "lora_sha256": f"sha-{number}" if number else None, "num_samples": 6 if number else 0,
        "num_pairs": 3 if number else 0, "num_ties": 0, "eval_scorer": "prompt_alignment",
        "eval_score_mean": score.mean, "eval_score_low": score.low, "eval_score_high": score.high, "loss_mean": 0.7,
        "clip_fraction": 0.0, "pair_accuracy_before": 0.6, "mlflow_run_id": f"run-{number}",
        "config_sha256": config.sha256(), "git_commit": "abc", "finished_at": MORNING,
    }  # fmt: skip
    row |= {f"{stage}_seconds": 1.0 for stage in ("sample", "judge", "derive", "train", "evaluate", "publish")}
    write_table(config.folder, "rounds", number, table_from_rows("rounds", [row]))


def paint(path: Path, seed: int) -> None:
    """An image of noise, so that no two are alike."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)).save(path)
