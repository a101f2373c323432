"""Mark flow runs that were cut off without a report."""

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


def _runs(ports: Ports, state: dict[str, Any], seconds: float) -> list[dict[str, Any]]:
    body = {"flow_runs": {"state": state}, "work_pools": {"name": {"any_": [POOL]}}}
    found: list[dict[str, Any]] = ask(ports, "POST", "/flow_runs/filter", body, seconds)
    return found


def _set_state(ports: Ports, run_id: str, state: str, message: str, seconds: float) -> None:
    body = {"state": {"type": state, "message": message}, "force": True}
    ask(ports, "POST", f"/flow_runs/{run_id}/set_state", body, seconds)
