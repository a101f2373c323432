"""What tests with real servers share: free ports, requests to Prefect, what a foreign page would send."""

import contextlib
import os
import socket
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from d3po.flows.loopback import without_proxy
from d3po.flows.server_processes import leader
from d3po.flows.server_programs import NAMES
from d3po_core.paths import PROJECT_ROOT

DATA = "da?ta #1 50%"  # each of these characters means something in an address


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def pids() -> dict[str, int]:
    found = {name: leader(name) for name in NAMES}
    return {name: process.pid for name, process in found.items() if process}


def login(home: Path) -> tuple[str, str]:
    name, _, password = (home / DATA / "servers" / "prefect-login").read_text().strip().partition(":")
    return name, password


def active_profile(home: Path) -> str:
    return tomllib.loads((home / "home" / "profiles.toml").read_text())["active"]


def call(ports: dict[str, int], method: str, path: str, body: Any = None) -> Any:
    """What the Prefect server answers, asked with the login; one whose database is busy is asked again."""
    url, auth = f"http://127.0.0.1:{ports['prefect']}/api{path}", login(Path(os.environ["HOME"]))
    for _ in range(10):
        answer = httpx.request(method, url, json=body, auth=auth, timeout=30, trust_env=False)
        if answer.status_code != 503:
            break
        time.sleep(1)
    answer.raise_for_status()
    return answer.json() if answer.content else None


def post(ports: dict[str, int], path: str, body: Any) -> Any:
    return call(ports, "POST", path, body)


def get(ports: dict[str, int], path: str) -> Any:
    return call(ports, "GET", path)


def shell() -> dict[str, str]:
    """Environment of somebody who typed the line that `up` prints where there is a proxy."""
    return os.environ | without_proxy(os.environ)


def eventually(found: Callable[[], Any], seconds: float = 60) -> Any:
    """What is found at last; a server that is too busy to answer is asked again."""
    deadline = time.monotonic() + seconds
    result = None
    while not result and time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            result = found()
        if not result:
            time.sleep(0.2)
    return result


def make_running(ports: dict[str, int]) -> str:
    """A flow run that the server believes to be running; call it while no worker could pick it up."""
    deployment = get(ports, "/deployments/name/d3po/published")["id"]
    run_id = post(ports, f"/deployments/{deployment}/create_flow_run", {})["id"]
    post(ports, f"/flow_runs/{run_id}/set_state", {"state": {"type": "RUNNING"}, "force": True})
    return run_id


def flow_process(run_id: str) -> psutil.Process | None:
    """The process in which a worker runs a flow run."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get("PREFECT__FLOW_RUN_ID") == run_id and "prefect.engine" in " ".join(
                process.cmdline()
            ):
                return process
    return None


def stranger(ports: dict[str, int], server: str, method: str, path: str, **changes: Any) -> int:
    """Status of what a page elsewhere has a browser send; browsers add no login of ours."""
    url = f"http://127.0.0.1:{ports[server]}{path}"
    return httpx.request(method, url, timeout=30, trust_env=False, **changes).status_code


def deployment_parameters(name: str) -> dict[str, Any]:
    entries = yaml.safe_load((PROJECT_ROOT / "prefect.yaml").read_text())["deployments"]
    return next(entry["parameters"] for entry in entries if entry["name"] == name)
