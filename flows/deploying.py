"""Register the deployments of prefect.yaml, and keep what a person changed on Prefect's page."""

import hashlib
import json
from typing import Any

from d3po.flows.prefect_api import ask
from d3po.flows.programs import run_program
from d3po.flows.project import deployments
from d3po.flows.server_files import SET_DATA, Ports, server_file
from d3po.flows.server_programs import POOL, PREFECT, client_environment
from d3po_core.paths import DEPLOYMENTS, PROJECT_ROOT, project_folder
from d3po_core.store.files import atomic_path

# Deployments are registered again when one of these files or prefect.yaml changes.
SOURCES = (
    "d3po/flows/round.py", "d3po/flows/form.py", "d3po/flows/wake.py", "d3po/flows/import_judgements.py",
    "d3po_core/config.py",
)  # fmt: skip
# The fields that a person can change on a deployment's page.
FIELDS = (
    "schedules", "paused", "parameters", "description", "tags", "job_variables", "concurrency_limit",
    "concurrency_options", "work_pool_name", "work_queue_name", "enforce_parameter_schema",
)  # fmt: skip
SCHEDULE = ("slug", "schedule", "active", "max_scheduled_runs", "parameters")
DEPLOYED = "deployed.json"

View = dict[str, Any]


def create_pool(ports: Ports) -> None:
    """Create the work pool and the limit of one run on the GPU, unless they exist.

    The worker completes the pool's settings.

    Raises:
        D3POError: the Prefect server does not answer.
    """
    if ask(ports, "GET", f"/work_pools/{POOL}") is None:
        ask(ports, "POST", "/work_pools/", {"name": POOL, "type": "process"})
    if ask(ports, "GET", "/v2/concurrency_limits/gpu") is None:
        ask(ports, "POST", "/v2/concurrency_limits/", {"name": "gpu", "limit": 1})


def deploy(ports: Ports, login: str) -> list[str]:
    """Register the deployments, unless they exist and their sources have not changed.

    Changes made on Prefect's page since the last call are kept.

    Returns:
        Lines to show; none if there was nothing to do.

    Raises:
        D3POError: Prefect refuses, or does not answer.
    """
    remembered, before = _read_deployed(), _views(ports)
    wanted = {_key(entry) for entry in deployments()}
    if remembered.get("digest") == _digest() and wanted <= before.keys():
        return []
    run_program([*PREFECT, "deploy", "--all"], client_environment(ports, login), project_folder())
    after, earlier = _views(ports), remembered.get("deployments", {})
    kept = {key: _put_back(ports, before[key], after[key], earlier.get(key)) for key in sorted(wanted & before.keys())}
    gone = sorted(wanted & earlier.keys() - before.keys())
    with atomic_path(server_file(DEPLOYED), SET_DATA, private=True) as temporary:
        temporary.touch(mode=0o600)
        temporary.write_text(json.dumps({"digest": _digest(), "deployments": {key: after[key] for key in wanted}}))
    return [
        "deployments registered",
        *(f"{after[key]['name']}: {', '.join(kept[key])} stay as on Prefect's page" for key in kept if kept[key]),
        *(f"{after[key]['name']}: was gone from Prefect, registered again" for key in gone),
    ]


def _put_back(ports: Ports, before: View, after: View, left: View | None) -> list[str]:
    """Restore the values that a person changed, and return their names.

    ``left`` is how we left the deployment, None if unknown.
    """
    known = {"schedules": None} if left is None else left  # an earlier version's: people mostly change schedules
    changed = [name for name in FIELDS if name in known and before[name] not in (known[name], after[name])]
    path = f"/deployments/{after['id']}"
    if values := {name: before[name] for name in changed if name != "schedules"}:
        ask(ports, "PATCH", path, values)
    if "schedules" in changed:
        for schedule in ask(ports, "GET", f"{path}/schedules") or ():
            ask(ports, "DELETE", f"{path}/schedules/{schedule['id']}")
        if before["schedules"]:
            ask(ports, "POST", f"{path}/schedules", before["schedules"])
    return changed


def _views(ports: Ports) -> dict[str, View]:
    """All deployments of the server, with the fields that a person can change."""
    found = {}
    for deployment in ask(ports, "POST", "/deployments/filter", {}) or ():
        schedules = [{name: schedule[name] for name in SCHEDULE} for schedule in deployment["schedules"]]
        schedules.sort(key=lambda schedule: (schedule["slug"] or "", json.dumps(schedule["schedule"], sort_keys=True)))
        limit = (deployment["global_concurrency_limit"] or {}).get("limit")
        fields = {name: deployment[name] for name in ("id", "name", *FIELDS)}
        found[_key(deployment)] = fields | {"schedules": schedules, "concurrency_limit": limit}
    return found


def _key(deployment: dict[str, Any]) -> str:
    return f"{deployment['entrypoint']} {deployment['name']}"


def _digest() -> str:
    """Digest of everything that decides what is deployed."""
    project = project_folder()
    files = [project / DEPLOYMENTS, *(PROJECT_ROOT / name for name in SOURCES)]
    return hashlib.sha256(b"\0".join([str(project).encode(), *(file.read_bytes() for file in files)])).hexdigest()


def _read_deployed() -> dict[str, Any]:
    """The deployments as we last registered them; empty if unknown."""
    try:
        found = json.loads(server_file(DEPLOYED).read_text())
        whole = all(set(FIELDS) <= view.keys() for view in found["deployments"].values())
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return {}
    return found if whole else {}
