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


# Kills spread evenly over all commits of files in two rounds: campaign and goal, the evaluation of the base, shards and
# their images, judgements, preferences, updates in progress, the checkpoint, the round's row. A campaign is killed at
# every other of them before the commit, and another at the rest after it; each attempt goes on where the last one died,
# so that no stage is computed again for a kill in a later one. D3PO_KILLS=40 kills at more points.
KILLS = int(os.environ.get("D3PO_KILLS", "10"))


def kill_points(commits: int, kills: int, after: bool) -> list[int]:
    """The commits of an undisturbed run at which to kill, every second of those evenly spread."""
    # Not after the very last one: then the run is finished, and the same command adds rounds.
    spread = [1 + kill * (commits - 1) // max(1, kills - 1) for kill in range(kills)]
    return [at for at in spread[int(after) :: 2] if not (after and at == commits)]


def kill_at_each(
    run_rounds: Callable[..., int], data: Path, values: dict[str, Any], rounds: int, points: list[int], after: bool
) -> Path:
    """Kill the run at each of these commits, counted over all its attempts, then let it end; gives its folder."""
    campaign = data / "runs" / values["campaign"]
    for point in points:
        assert run_rounds(values, rounds, kill_at=point, after=after) == -9, f"no kill at commit {point}"
    assert run_rounds(values, rounds) == 0
    assert not list(campaign.rglob("*.tmp")), "half-written files of a killed run are still there"
    return campaign


@pytest.mark.timeout(900)
@pytest.mark.parametrize("after", [False, True])
def test_killed_run_ends_as_an_undisturbed_one(
    after: bool, run_rounds: Callable[..., int], data: Path, undisturbed: dict[str, Any]
) -> None:
    points = kill_points(int((data / "undisturbed.commits").read_text()), KILLS, after)
    values = small(f"killed-{'after' if after else 'before'}")
    assert outcome(kill_at_each(run_rounds, data, values, ROUNDS, points, after)) == undisturbed
