"""The local servers of the nightly loop: Prefect, MLflow, the labelling page, and the worker that runs the rounds.

Each is an ordinary command-line program in its own session, so that it outlives the shell that started it.
What was started is kept in ``<data folder>/servers/servers.json``; only what stands there is ever ended.
"""

import contextlib
import hashlib
import json
import os
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil

from d3po_core.config import PROJECT_ROOT, data_folder
from d3po_core.errors import D3POError
from d3po_core.tables import disk_errors

HOST = "127.0.0.1"
NAMES = ("prefect", "mlflow", "label", "worker")
POOL = PROFILE = "d3po"
WORKER = "d3po-worker"
FLOW_RUN = "PREFECT__FLOW_RUN_ID"  # set by Prefect in the process of a flow run
RUN_OWNER = "D3PO_RUN_OWNER"  # set by us in the process of a d3po run, and so in its temporary server
START_SECONDS = 120.0
SET_DATA = "or set D3PO_DATA to another folder"
PREFECT = (sys.executable, "-m", "prefect", "--no-prompt")
QUIET = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "TRANSFORMERS_VERBOSITY": "error",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
}

Ports = dict[str, int]
State = dict[str, Any]


def up(prefect_port: int = 4200, mlflow_port: int = 5000, label_port: int = 8700) -> list[str]:
    """Start what is not running yet, deploy, and return lines to show.

    Args:
        prefect_port: port of the Prefect server; all ports stay as they are while any of the servers runs.
        mlflow_port: port of the MLflow server.
        label_port: port of the labelling page.

    Raises:
        D3POError: a port is taken, the shell is set to another Prefect server, or a server did not start.
    """
    state, lines = _read_state(), []
    asked = {"prefect": prefect_port, "mlflow": mlflow_port, "label": label_port}
    missing = [name for name in NAMES if not _process(state, name)]
    if len(missing) == len(NAMES):
        state["ports"] = asked
    ports = state["ports"] = asked | state["ports"]  # servers of an earlier version had no page
    _require_own_shell(_api(ports))
    servers = [name for name in missing if name in ports]
    for name in servers:
        _end(_session(state, name))  # a server that was killed leaves children, which hold its port
        _require_free_port(name, ports[name])
    for name in servers:
        _start(state, name)
    _wait(state, "prefect", lambda: _answers(f"{_api(ports)}/health"))
    _create_pool(ports)
    since = datetime.now(UTC)
    if "worker" in missing:
        lines += _crash_lost_runs(ports)
        _start(state, "worker")
    if "prefect" in missing or state.get("deployed") != _deployed_files():  # while the worker starts
        _deploy(state)
        lines.append("deployments registered")
    for name in ("mlflow", "label"):
        _wait(state, name, partial(_answers, f"{_url(ports, name)}/health"))
    if "worker" in missing:
        _wait(state, "worker", lambda: _polls(ports, since))
    lines.append(f"started: {', '.join(missing)}" if missing else "everything is already running")
    if ports != asked:
        lines.append("the ports stay as they were; type `d3po down` first to change them")
    lines += [f"Prefect: {_url(ports, 'prefect')}", f"MLflow: {_url(ports, 'mlflow')}"]
    lines.append(f"Labelling page: {_url(ports, 'label')} (d3po label --rater NAME prints a person's link)")
    return [*lines, "type next: prefect deployment run d3po/round -p rounds=2 --watch"]


def down() -> list[str]:
    """End what ``up`` started, the worker first, restore the Prefect profile, and return lines to show."""
    state, lines = _read_state(), []
    for name in reversed(NAMES):
        if processes := _session(state, name):
            _end(processes)
            lines.append(f"{name}: ended (pid {state['processes'][name]['pid']})")
        if name == "worker" and state:
            _end([process for process, environment in _ours(state["ports"]) if FLOW_RUN in environment])
            if _process(state, "prefect"):
                lines += _crash_lost_runs(state["ports"])
    if "profile" in state and _active_profile() == PROFILE:
        with contextlib.suppress(D3POError):  # removed since: the line says which one is active
            _choose_profile(state["profile"])
        lines.append(f"Prefect profile: {_active_profile()}")
    with contextlib.suppress(NotADirectoryError):
        _file("servers.json").unlink(missing_ok=True)
    return lines or ["nothing to end: no servers are running"]


def status() -> list[str]:
    """Return lines that say what runs, where, and where its log is."""
    state, lines = _read_state(), []
    for name in NAMES:
        process = _process(state, name)
        where = f" {_url(state['ports'], name)}" if process and name in state["ports"] else ""
        what = f"running{where} (pid {process.pid})" if process else "not running"
        lines.append(f"{name}: {what}, log {_file(name + '.log')}")
    lines.append(f"Prefect profile: {_active_profile()}")
    return lines if all(_process(state, name) for name in NAMES) else [*lines, "type next: d3po up"]


def end_orphans() -> None:
    """End temporary Prefect servers of this data folder whose ``d3po run`` was killed; mark those to come as ours."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            environment = process.environ()
            owner = environment.get(RUN_OWNER)
            if owner and environment.get("PREFECT_HOME") == os.environ.get("PREFECT_HOME"):
                pid, created = owner.split()
                if not _living(int(pid), float(created)):
                    _end([process])
    own = psutil.Process()
    os.environ[RUN_OWNER] = f"{own.pid} {own.create_time()}"


def prefect_url() -> str | None:
    """API address of the Prefect server that ``up`` started, None when it does not run."""
    state = _read_state()
    return _api(state["ports"]) if _process(state, "prefect") else None


def find_prefect() -> bool:
    """Point this process to the server of ``d3po up``, unless the shell names one; say whether there is any."""
    if url := prefect_url():
        os.environ.setdefault("PREFECT_API_URL", url)
    return "PREFECT_API_URL" in os.environ


def _url(ports: Ports, name: str) -> str:
    return f"http://{HOST}:{ports[name]}"


def _api(ports: Ports) -> str:
    return f"{_url(ports, 'prefect')}/api"


def _file(name: str) -> Path:
    return data_folder() / "servers" / name


def _environment(ports: Ports) -> dict[str, str]:
    """Environment of the servers, without the user's profile, which may point to another Prefect server."""
    kept = {key: value for key, value in os.environ.items() if key not in ("PREFECT_PROFILE", "PREFECT_PROFILES_PATH")}
    return kept | QUIET | {
        "D3PO_DATA": str(data_folder()),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(PROJECT_ROOT), os.environ.get("PYTHONPATH")))),
        "PREFECT_HOME": str(data_folder() / "prefect"),
        "PREFECT_API_URL": _api(ports),
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{data_folder()}/prefect/prefect.db",
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "D3PO_LABEL_URL": _url(ports, "label"),
        "D3PO_MLFLOW_URL": _url(ports, "mlflow"),
    }  # fmt: skip


def _command(name: str, ports: Ports) -> list[str]:
    if name == "worker":
        return [*PREFECT, "worker", "start", "--pool", POOL, "--name", WORKER, "--type", "process"]
    address, folder = ["--host", HOST, "--port", str(ports[name])], data_folder() / "mlflow"
    if name == "prefect":
        return [*PREFECT, "server", "start", *address]
    if name == "label":
        return [sys.executable, "-c", "from flows.command_line import main; main()", "label", *address]
    stores = ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", f"{folder}/artifacts"]
    return [sys.executable, "-m", "mlflow", "server", *address, "--workers", "1", *stores]


def _require_own_shell(api: str) -> None:
    """Refuse a shell whose ``prefect`` commands would go to another server than the one started here."""
    for name, expected in (("PREFECT_API_URL", api), ("PREFECT_PROFILE", PROFILE)):
        found = os.environ.get(name)
        if found and found.rstrip("/").replace("localhost", HOST) != expected:
            raise D3POError(
                f"{name} is set to {found!r}, so `prefect` in this shell would not reach the server of `d3po up` at "
                f"{api}; type `unset {name}`, then `d3po up` (or leave `d3po up` out and deploy to your own server)"
            )


def _require_free_port(name: str, port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise D3POError(
                f"port {port} for {name} cannot be used ({reason}); type `d3po up --{name}-port <a free port>`"
            ) from None


def _read_state() -> State:
    file = _file("servers.json")
    return json.loads(file.read_text()) if file.exists() else {}


def _write_state(state: State) -> None:
    temporary = _file("servers.json.tmp")
    with disk_errors(temporary, SET_DATA):
        temporary.write_text(json.dumps(state, indent=2))
        temporary.replace(_file("servers.json"))


def _process(state: State, name: str) -> psutil.Process | None:
    """The process that ``up`` started under this name, unless it has ended."""
    record = state.get("processes", {}).get(name)
    return _living(record["pid"], record["created"]) if record else None


def _living(pid: int, created: float) -> psutil.Process | None:
    """The process, unless it has ended or its pid is another process now."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        if abs(process.create_time() - created) < 1 and process.status() != psutil.STATUS_ZOMBIE:
            return process
    return None


def _start(state: State, name: str) -> None:
    for folder in ("servers", "prefect", "mlflow/artifacts"):
        with disk_errors(data_folder() / folder, SET_DATA):
            (data_folder() / folder).mkdir(parents=True, exist_ok=True)
    with disk_errors(_file(f"{name}.log"), SET_DATA):
        log = _file(f"{name}.log").open("ab")
    with log:
        child = subprocess.Popen(
            _command(name, state["ports"]), env=_environment(state["ports"]), cwd=PROJECT_ROOT,
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    record = {"pid": child.pid, "created": psutil.Process(child.pid).create_time()}
    state.setdefault("processes", {})[name] = record
    _write_state(state)


def _wait(state: State, name: str, ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not ready():
        if not _process(state, name):
            raise D3POError(f"{name} ended while it started; {_file(name + '.log')} says why")
        if time.monotonic() > deadline:
            raise D3POError(f"{name} did not answer within {START_SECONDS:.0f} s; see {_file(name + '.log')}")
        time.sleep(0.2)


def _answers(url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(url, timeout=5, trust_env=False).is_success
    return False


def _post(ports: Ports, path: str, body: dict[str, Any]) -> Any:
    return httpx.post(f"{_api(ports)}{path}", json=body, timeout=30, trust_env=False).raise_for_status().json()


def _polls(ports: Ports, since: datetime) -> bool:
    workers = _post(ports, f"/work_pools/{POOL}/workers/filter", {})
    beats = [worker["last_heartbeat_time"] for worker in workers if worker["name"] == WORKER]
    return any(beat and datetime.fromisoformat(beat) >= since for beat in beats)


def _run(command: list[str], environment: dict[str, str]) -> None:
    done = subprocess.run(
        command, env=environment, cwd=PROJECT_ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if done.returncode:
        said = " ".join((done.stdout + done.stderr).rpartition("╯")[2].split())
        raise D3POError(f"`{' '.join(command[1:])}` failed: {said}")


def _choose_profile(*name_and_url: str) -> None:
    """Make a profile of the user's own Prefect the active one."""
    _run([sys.executable, "-m", "flows.prefect_profile", *name_and_url], os.environ | QUIET)


def _deployed_files() -> str:
    """Digest of the files that decide what is deployed."""
    files = [
        PROJECT_ROOT / name
        for name in (
            "prefect.yaml",
            "flows/round.py",
            "flows/wake.py",
            "flows/import_judgements.py",
            "d3po_core/config.py",
        )
    ]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files if file.exists())).hexdigest()


def _create_pool(ports: Ports) -> None:
    """Create the work pool, whose worker completes it, and the limit of one run on the GPU, unless they exist."""
    if not _answers(f"{_api(ports)}/work_pools/{POOL}"):
        _post(ports, "/work_pools/", {"name": POOL, "type": "process"})
    if not _answers(f"{_api(ports)}/v2/concurrency_limits/gpu"):
        _post(ports, "/v2/concurrency_limits/", {"name": "gpu", "limit": 1})


def _deploy(state: State) -> None:
    """Register the deployments, and point plain ``prefect`` commands to our server."""
    ports, digest = state["ports"], _deployed_files()
    _run([*PREFECT, "deploy", "--all"], _environment(ports))
    if (earlier := _active_profile()) != PROFILE:
        state["profile"] = earlier
        _write_state(state)
    _choose_profile(PROFILE, _api(ports))
    state["deployed"] = digest
    _write_state(state)


def _active_profile() -> str:
    """Name of the profile that a plain ``prefect`` command uses."""
    home = Path(os.environ.get("PREFECT_HOME") or "~/.prefect").expanduser()
    file = Path(os.environ.get("PREFECT_PROFILES_PATH") or home / "profiles.toml").expanduser()
    return tomllib.loads(file.read_text()).get("active", "ephemeral") if file.exists() else "ephemeral"


def _ours(ports: Ports) -> list[tuple[psutil.Process, dict[str, str]]]:
    """All living processes that carry the environment of our servers: they and what they started."""
    marks, found = {"PREFECT_API_URL": _api(ports), "D3PO_DATA": str(data_folder())}, []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            environment = process.environ()
            if marks.items() <= environment.items():
                found.append((process, environment))
    return found


def _session(state: State, name: str) -> list[psutil.Process]:
    """What lives of a server, oldest first: the processes of its session, also when the first was killed."""
    if not (record := state.get("processes", {}).get(name)):
        return []
    found = []
    for process, _ in _ours(state["ports"]):
        with contextlib.suppress(psutil.Error, OSError):
            if os.getsid(process.pid) == record["pid"] and process.create_time() > record["created"] - 1:
                found.append(process)
    return sorted(found, key=psutil.Process.create_time)


def _crash_lost_runs(ports: Ports) -> list[str]:
    """Mark runs as Crashed whose process is gone and whose worker died too, so that nobody said so."""
    alive = {environment.get(FLOW_RUN) for _, environment in _ours(ports)}
    unfinished = {"state": {"type": {"any_": ["RUNNING", "PENDING", "CANCELLING"]}}}
    runs = _post(ports, "/flow_runs/filter", {"flow_runs": unfinished, "work_pools": {"name": {"any_": [POOL]}}})
    lost = [run["id"] for run in runs if run["id"] not in alive]
    for run_id in lost:
        crashed = {"type": "CRASHED", "message": "Its worker and its process ended without a report."}
        _post(ports, f"/flow_runs/{run_id}/set_state", {"state": crashed, "force": True})
    return [f"{run_id}: lost, now Crashed; to go on: prefect flow-run retry {run_id}" for run_id in lost]


def _end(family: list[psutil.Process]) -> None:
    """Ask the first to end, twice, since a worker may ignore the first time; then all of them; then force them."""
    for wave in (family[:1], family[:1], family):
        for process in wave:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        psutil.wait_procs(wave, timeout=5)
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(family, timeout=5)
