"""Run deployments every night: schedules are paused until somebody asks for them."""

from collections.abc import Sequence
from typing import Any

from d3po.flows.prefect_api import ask
from d3po.flows.presets import presets
from d3po.flows.server_files import Ports
from d3po_core.errors import D3POError

FLOW = "d3po"
# For a deployment without a schedule of its own in prefect.yaml.
EVERY_NIGHT = {"slug": "nightly", "active": True, "schedule": {"cron": "0 2 * * *", "timezone": "UTC"}}


def require_rounds(names: Sequence[str]) -> None:
    """Refuse names that are no deployments of rounds in prefect.yaml.

    Raises:
        D3POError: one is not.
    """
    known = presets()
    for name in names:
        if name not in known:
            raise D3POError(
                f"--nightly {name}: no such deployment of rounds in prefect.yaml; it has {', '.join(known) or 'none'}"
            )


def start_nightly(ports: Ports, names: Sequence[str]) -> list[str]:
    """Switch on the schedules of these deployments, and return a line about all schedules of rounds.

    Args:
        ports: of our servers.
        names: deployments of rounds in prefect.yaml.

    Raises:
        D3POError: the Prefect server does not answer.
    """
    for name in names:
        deployment = ask(ports, "GET", f"/deployments/name/{FLOW}/{name}")
        path = f"/deployments/{deployment['id']}"
        if deployment["paused"]:  # by a person, or by an automation
            ask(ports, "PATCH", path, {"paused": False})
        for schedule in deployment["schedules"]:
            ask(ports, "PATCH", f"{path}/schedules/{schedule['id']}", {"active": True})
        if not deployment["schedules"]:
            ask(ports, "POST", f"{path}/schedules", [EVERY_NIGHT])
    return _shown(ask(ports, "POST", "/deployments/filter", {"flows": {"name": {"any_": [FLOW]}}}) or [])


def _shown(deployments: list[dict[str, Any]]) -> list[str]:
    active = [
        f"{deployment['name']} ({_when(schedule['schedule'])})"
        for deployment in deployments if not deployment["paused"]
        for schedule in deployment["schedules"] if schedule["active"]
    ]  # fmt: skip
    if active:
        return [f"on a schedule: {', '.join(sorted(active))}; to pause one, use its switch on Prefect's page"]
    return ["nothing runs at night; for one round per night: d3po up --nightly round"]


def _when(schedule: dict[str, Any]) -> str:
    if "cron" in schedule:
        return f"cron {schedule['cron']} {schedule.get('timezone') or 'UTC'}"
    return f"every {schedule['interval']:.0f} s" if "interval" in schedule else str(schedule.get("rrule"))
