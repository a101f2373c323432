"""Find and control our processes: their environment has our data folder and a server's name.

We trust no file of pids: a pid may belong to another program by now, and a file can be lost. We cannot read other
users' processes, so they never count as ours.
"""

import contextlib
import os
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from d3po.flows.server_files import Ports, open_log, read_state, server_file
from d3po.flows.server_programs import MARK, api_url, server_command, server_environment
from d3po_core.errors import D3POError
from d3po_core.paths import data_folder, project_folder

FLOW_RUN = "PREFECT__FLOW_RUN_ID"  # Prefect sets it in the process of a flow run
RUN_OWNER = "D3PO_RUN_OWNER"  # we set it in the process of a d3po run; its temporary server inherits it
START_SECONDS = 120.0
MOST_COMMAND = 100  # characters of another program's command line that a message shows
ADDRESSES = {"prefect": "PREFECT_API_URL", "mlflow": "D3PO_MLFLOW_URL", "label": "D3PO_LABEL_URL"}

Found = tuple[psutil.Process, dict[str, str]]


def family(name: str) -> list[psutil.Process]:
    """A server's living processes: itself and what it started; oldest first, flow runs last.

    The children are found even if the server itself was killed.
    """
    records = read_state().get("processes", {})
    found = [found for found in _of_this_folder() if _name(*found, records) == name]
    found.sort(key=lambda found: (FLOW_RUN in found[1], _created(found[0])))
    return [process for process, _ in found]


def leader(name: str) -> psutil.Process | None:
    """A server's own process, None if it does not run."""
    records = read_state().get("processes", {})
    for process, environment in _of_this_folder():
        if FLOW_RUN not in environment and _leads(process) and _name(process, environment, records) == name:
            return process
    return None


def known_ports() -> Ports:
    """Ports of the running servers, read from their processes, else the remembered ports."""
    state = read_state()
    ports, records = dict(state.get("ports", {})), state.get("processes", {})
    for process, environment in _of_this_folder():
        if FLOW_RUN not in environment and _name(process, environment, records):
            for name, variable in ADDRESSES.items():
                digits = environment.get(variable, "").removesuffix("/api").rpartition(":")[2]
                ports |= {name: int(digits)} if digits.isdecimal() else {}
    return ports


def living_flow_runs(ports: Ports) -> set[str]:
    """Ids of the flow runs of our Prefect server that have a process."""
    here = [environment for _, environment in _of_this_folder() if environment.get("PREFECT_API_URL") == api_url(ports)]
    return {environment[FLOW_RUN] for environment in here if FLOW_RUN in environment}


def start(name: str, ports: Ports, login: str) -> None:
    """Start a server in its own session, so that it outlives the shell.

    Raises:
        D3POError: its log cannot be written.
    """
    log = open_log(name)
    try:
        subprocess.Popen(
            server_command(name, ports), env=server_environment(name, ports, login), cwd=project_folder(),
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    finally:
        os.close(log)


def wait(name: str, ready: Callable[[], bool]) -> None:
    """Wait until a started server is ready.

    Raises:
        D3POError: it ended, or takes longer than ``START_SECONDS``.
    """
    deadline = time.monotonic() + START_SECONDS
    while not ready():
        if not leader(name):
            raise D3POError(f"{name} ended while it started; {server_file(name + '.log')} says why")
        if time.monotonic() > deadline:
            raise D3POError(f"{name} did not answer within {START_SECONDS:.0f} s; see {server_file(name + '.log')}")
        time.sleep(0.2)


def end(processes: list[psutil.Process]) -> None:
    """Ask the first process to end, twice, then all of them; then kill them.

    A worker may ignore the first request. If the leader was killed, its children get only a second: they wait for
    nobody, and may not be able to end by themselves.
    """
    first = [process for process in processes[:1] if _leads(process)]
    for wave, seconds in ((first, 5), (first, 5), (processes, 5 if first else 1)):
        for process in wave:
            with contextlib.suppress(psutil.Error):
                process.terminate()
                process.resume()  # a stopped process does not see the signal
        psutil.wait_procs(wave, timeout=seconds)
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(processes, timeout=5)


def who_listens(port: int) -> str:
    """The program that listens on a port, and how to end it if it is ours; empty if unknown."""
    with contextlib.suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                process = psutil.Process(connection.pid)
                return _described(process, process.environ())
    return ""


def lost_servers() -> list[str]:
    """A line per removed data folder whose servers still run, with the command that ends them."""
    running: dict[str, dict[str, int]] = {}
    for process, environment in _all():
        folder = environment.get("D3PO_DATA", "")
        if MARK in environment and FLOW_RUN not in environment and not Path(folder).is_dir():
            running.setdefault(folder, {}).setdefault(environment[MARK], process.pid)
    return [
        f"data folder {folder} is gone, but its servers run: "
        f"{', '.join(f'{name} (pid {pid})' for name, pid in pids.items())}; to end them: {_down(folder)}"
        for folder, pids in running.items()
    ]


def _described(process: psutil.Process, environment: dict[str, str]) -> str:
    folder = environment.get("D3PO_DATA", "")
    if MARK in environment:
        gone = "" if Path(folder).is_dir() else ", which is gone"
        return f"the {environment[MARK]} of data folder {folder}{gone}, pid {process.pid}; to end it: {_down(folder)}"
    command = " ".join(process.cmdline())
    shown = command if len(command) <= MOST_COMMAND else f"{command[:MOST_COMMAND]}..."
    return f"{process.name()}, pid {process.pid}: {shown}"


def _down(folder: str) -> str:
    return f"D3PO_DATA={shlex.quote(folder)} d3po down"


def end_orphans() -> None:
    """End temporary Prefect servers of this data folder whose ``d3po run`` was killed.

    It also marks this process as the owner of those it will start.
    """
    for process, environment in _all():
        pid, _, created = environment.get(RUN_OWNER, "").partition(" ")
        with contextlib.suppress(ValueError):
            if pid and environment.get("PREFECT_HOME") == os.environ.get("PREFECT_HOME") and not _lives(pid, created):
                end([process])
    own = psutil.Process()
    os.environ[RUN_OWNER] = f"{own.pid} {own.create_time()}"


def _lives(pid: str, created: str) -> bool:
    try:
        process = psutil.Process(int(pid))
        return abs(process.create_time() - float(created)) < 1 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _all() -> Iterator[Found]:
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            yield process, process.environ()


def _of_this_folder() -> list[Found]:
    folder = str(data_folder())
    return [found for found in _all() if found[1].get("D3PO_DATA") == folder]


def _name(process: psutil.Process, environment: dict[str, str], records: dict[str, dict[str, int]]) -> str | None:
    """The server that a process belongs to, None if it is not ours."""
    if MARK in environment:
        return environment[MARK]
    if ADDRESSES["mlflow"] not in environment:  # only `up` sets it
        return None
    with contextlib.suppress(OSError):  # an earlier version set no mark
        session = os.getsid(process.pid)
        return next((name for name, record in records.items() if record["pid"] == session), None)
    return None


def _leads(process: psutil.Process) -> bool:
    """Return whether a process is the first of its session, as every server is."""
    with contextlib.suppress(OSError):
        return os.getsid(process.pid) == process.pid
    return False


def _created(process: psutil.Process) -> float:
    with contextlib.suppress(psutil.Error):
        return process.create_time()
    return float("inf")
