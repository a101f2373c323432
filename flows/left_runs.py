"""Clean up flow runs that nobody handled: cut off without a report, or late because no worker ran."""

from datetime import UTC, datetime
from itertools import groupby
from typing import Any

from d3po.flows.prefect_api import ask
from d3po.flows.server_files import Ports
from d3po.flows.server_processes import living_flow_runs
from d3po.flows.server_programs import POOL


def crash_lost_runs(ports: Ports, seconds: float = 30.0) -> list[str]:
    """Mark runs as Crashed if their process is gone and their worker died before reporting it.

    Args:
        ports: of our servers.
        seconds: how long to wait for a silent Prefect server.

    Returns:
        A line per run, with the command to type to go on.

    Raises:
        D3POError: the Prefect server does not answer.
    """
    alive = living_flow_runs(ports)
    runs = _runs(ports, {"type": {"any_": ["RUNNING", "PENDING", "CANCELLING"]}}, seconds)
    lost = [run["id"] for run in runs if run["id"] not in alive]
    for run_id in lost:
        _set_state(ports, run_id, "CRASHED", "Its worker and its process ended without a report.", seconds)
    return [f"{run_id}: lost, now Crashed; to go on: prefect flow-run retry {run_id}" for run_id in lost]


def keep_one_late_run(ports: Ports) -> list[str]:
    """Cancel all but the last scheduled run of each deployment that was missed while no worker ran.

    Call it while no worker runs. It leaves runs that somebody asked for, retries and resumed runs alone.

    Returns:
        A line per deployment that missed more than one run.

    Raises:
        D3POError: the Prefect server does not answer.
    """
    waiting = _runs(ports, {"name": {"any_": ["Scheduled", "Late"]}}, expected_start_time={"before_": _now()})
    nightly = [run for run in waiting if run["auto_scheduled"]]
    nightly.sort(key=lambda run: (run["deployment_id"] or "", run["expected_start_time"]))
    lines = []
    for deployment, runs in groupby(nightly, key=lambda run: run["deployment_id"]):
        *missed, last = runs
        for run in missed:
            _set_state(ports, run["id"], "CANCELLED", "Nobody was there to run it; a later run stands for it.")
        if missed:
            name = (ask(ports, "GET", f"/deployments/{deployment}") or {}).get("name", deployment)
            lines.append(
                f"deployment {name}: {len(missed) + 1} scheduled runs were missed, one runs now ({last['name']})"
            )
    return lines


def _runs(ports: Ports, state: dict[str, Any], seconds: float = 30.0, **more: Any) -> list[dict[str, Any]]:
    body = {"flow_runs": {"state": state, **more}, "work_pools": {"name": {"any_": [POOL]}}}
    found: list[dict[str, Any]] = ask(ports, "POST", "/flow_runs/filter", body, seconds)
    return found


def _set_state(ports: Ports, run_id: str, state: str, message: str, seconds: float = 30.0) -> None:
    body = {"state": {"type": state, "message": message}, "force": True}
    ask(ports, "POST", f"/flow_runs/{run_id}/set_state", body, seconds)


def _now() -> str:
    return datetime.now(UTC).isoformat()
