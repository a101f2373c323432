"""A round by two processes through the flow; the run and one of them are killed, and the round ends alike."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from d3po_core.store.stages import finished_rounds
from tests.flows.test_kill import SMALL, outcome

MODEL, COMPUTE = {"device": "cpu"}, {"processes": 2}


def rounds(run_rounds: Callable[..., int], data: Path, name: str, **how: Any) -> Path:
    assert run_rounds({**SMALL, "campaign": name, "model": MODEL, "compute": COMPUTE}, 1, **how) == 0
    return data / "runs" / name


def ranks_of(data: Path) -> list[psutil.Process]:
    """Raylets that are alive on the tests' data."""
    found = []
    for process in psutil.process_iter(["cmdline", "environ"]):
        command, environment = process.info["cmdline"] or [], process.info["environ"] or {}
        if "raylet" in " ".join(command[:1]) and environment.get("D3PO_DATA") == str(data):
            found.append(process)
    return found


@pytest.mark.timeout(900)
def test_round_of_two_processes_ends_alike_whoever_was_killed(run_rounds: Callable[..., int], data: Path) -> None:
    """The run's own process dies with one of two updates on disk; a worker dies in the run that goes on.

    tests/tasks/test_ranks.py loses workers in each stage, tests/flows/test_kill.py a run of one process in each.
    """
    undisturbed = rounds(run_rounds, data, "two-processes")
    assert [record.round for record in finished_rounds(undisturbed)] == [0, 1]
    assert json.loads((undisturbed / "checkpoints/round=1/checkpoint.json").read_text())["processes"] == 2
    assert {path.name for path in (undisturbed / "logs").iterdir()} == {"worker-0.log", "worker-1.log"}

    name = "two-processes-killed"
    values, killed = {**SMALL, "campaign": name, "model": MODEL, "compute": COMPUTE}, data / "runs" / name
    assert run_rounds(values, 1, kill_at="checkpoints/round=1-update=", after=True) == -9
    assert list(killed.glob("checkpoints/round=1-update=*"))
    assert not list(killed.glob("updates/round=1/*"))
    assert outcome(rounds(run_rounds, data, name, kill_rank_in="train")) == outcome(undisturbed)
    assert (data / f"{name}.killed").read_text() == "rank 1"
    assert ranks_of(data) == []
