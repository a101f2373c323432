"""A run is killed and its disk is gone; another folder goes on from the mirror and ends with the same bytes."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.flows.test_kill import SMALL, outcome

LEASE_SECONDS = 1


def mirrored(runs: Path, mirror: Path) -> dict[str, Any]:
    store = {"mirror": f"file://{mirror}", "lease_seconds": LEASE_SECONDS}
    return {**SMALL, "campaign": "lost", "runs_dir": str(runs), "store": store}


def kept(campaign: Path) -> dict[str, Any]:
    """What a mirror without images and trajectories keeps: tables by content, checkpoints by bytes."""
    found = {name: value for name, value in outcome(campaign).items() if not name.startswith(("images/", "traj"))}
    for row in (row for name, rows in found.items() if name.startswith("rounds ") for row in rows):
        row.pop("git_commit")  # the code may be committed while a long benchmark runs
    return found


def go_on(run_rounds: Callable[..., int], values: dict[str, Any], kill_at: str | None = None) -> int:
    """Run a round; while the lost machine's lease lasts, try again."""
    for _ in range(20):
        code = run_rounds(values, 1, kill_at=kill_at, after=True)
        message = Path(values["runs_dir"]).parent / "data" / "lost.message"
        if code != 3 or "is written from" not in message.read_text():
            return code
    raise AssertionError("the lost machine's lease never ended")


@pytest.mark.timeout(900)
def test_two_lost_machines_change_nothing(
    run_rounds: Callable[..., int], data: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    assert run_rounds({**SMALL, "campaign": "never-lost"}, 1) == 0
    expected = kept(data / "runs" / "never-lost")
    home = data.parent
    (home / "mirror").mkdir()
    # Both machines that follow lack the images and trajectories of round 1, which they draw again.
    for machine, kill_at in enumerate(("lost/preferences/round=1", "lost/checkpoints/round=1")):
        runs = home / f"machine-{machine}"
        assert go_on(run_rounds, mirrored(runs, home / "mirror"), kill_at) == -9
        shutil.rmtree(runs)
    last = home / "machine-2"
    assert go_on(run_rounds, mirrored(last, home / "mirror")) == 0
    assert kept(last / "lost") == expected
    assert len(expected["rounds 1"]) == 1
