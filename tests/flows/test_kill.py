"""A run that is killed with SIGKILL and started again ends as one that was never killed, byte for byte."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from d3po_core.store.tables import SCHEMAS

ROUNDS = 2
SMALL: dict[str, Any] = {
    "sample": {"groups_per_round": 4, "group_size": 4, "batch_size": 8},
    "evaluate": {"images_per_prompt": 1, "max_prompts": 4, "grid_prompts": 2},
    "train": {"updates_per_round": 2, "save_every_seconds": 0},
}
# What tells of the run and not of its result.
VOLATILE = {"judged_at", "seconds", "finished_at", "mlflow_run_id", "config_sha256"}


def small(campaign: str) -> dict[str, Any]:
    return {**SMALL, "campaign": campaign}


def outcome(campaign: Path) -> dict[str, Any]:
    """Everything that must not depend on whether a run was killed."""
    found: dict[str, Any] = {}
    for table in SCHEMAS:
        for number in range(ROUNDS + 1):
            files = sorted((campaign / table / f"round={number}").glob("*"))
            rows = [row for file in files for row in pq.ParquetFile(file).read().to_pylist()]
            found[f"{table} {number}"] = [
                {k: v for k, v in row.items() if k not in VOLATILE and not k.endswith("_seconds")} for row in rows
            ]
    for pattern in ("checkpoints/*/*.safetensors", "trajectories/*/*", "images/*/*.png"):
        found |= {str(path.relative_to(campaign)): path.read_bytes() for path in campaign.glob(pattern)}
    return found


@pytest.fixture(scope="module")
def undisturbed(run_rounds: Callable[..., int], data: Path) -> dict[str, Any]:
    assert run_rounds(small("undisturbed"), ROUNDS) == 0
    found = outcome(data / "runs" / "undisturbed")
    assert len(found["rounds 2"]) == 1
    assert len(found["samples 2"]) == 16
    assert "checkpoints/round=2/pytorch_lora_weights.safetensors" in found
    return found


# Kills spread evenly over all commits of files in two rounds, before and after them in turn: campaign and goal, the
# evaluation of the base, shards and their images, judgements, preferences, updates in progress, the checkpoint, the
# round's row. D3PO_KILLS=40 kills at more points.
KILLS = int(os.environ.get("D3PO_KILLS", "6"))


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kill", range(KILLS))
def test_killed_run_ends_as_an_undisturbed_one(
    kill: int, run_rounds: Callable[..., int], data: Path, undisturbed: dict[str, Any]
) -> None:
    commits = int((data / "undisturbed.commits").read_text())
    # Not after the very last one: then the run is finished, and the same command adds rounds.
    kill_at, after = 1 + kill * (commits - 1) // max(1, KILLS - 1), kill % 2 == 1 and kill < KILLS - 1
    name = f"killed-{kill_at}-{'after' if after else 'before'}"
    assert run_rounds(small(name), ROUNDS, kill_at=kill_at, after=after) == -9
    assert run_rounds(small(name), ROUNDS) == 0
    assert outcome(data / "runs" / name) == undisturbed
    assert not list((data / "runs" / name).rglob("*.tmp")), "half-written files of the killed run are still there"


def test_run_killed_three_times_ends_as_an_undisturbed_one(
    run_rounds: Callable[..., int], data: Path, undisturbed: dict[str, Any]
) -> None:
    for kill_at in (25, 9, 14):
        assert run_rounds(small("killed-thrice"), ROUNDS, kill_at=kill_at) == -9
    assert run_rounds(small("killed-thrice"), ROUNDS) == 0
    assert outcome(data / "runs" / "killed-thrice") == undisturbed
