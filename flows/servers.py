"""The nightly loop's local servers: Prefect, MLflow, the labelling page, and the worker that runs rounds.

Each is an ordinary command-line program in its own session, so it outlives the shell that started it. We only end
processes that carry the mark of ``up``.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any

import psutil

from d3po.flows.deploying import create_pool, deploy
from d3po.flows.left_runs import crash_lost_runs
from d3po.flows.loopback import is_proxied, without_proxy
from d3po.flows.nightly import require_rounds, start_nightly
from d3po.flows.page_links import owner_line
from d3po.flows.prefect_api import answers, ask
from d3po.flows.prefect_profile import restore_profile, shown_profile, take_profile
from d3po.flows.project import deployments
from d3po.flows.server_checks import is_ours, require_free_port, require_login, require_own_shell, require_ports
from d3po.flows.server_files import (
    LOGIN_FILE,
    PORTS,
    SET_DATA,
    Ports,
    State,
    forget_all_but_ports,
    login,
    make_login,
    one_at_a_time,
    read_state,
    server_file,
    write_state,
)
from d3po.flows.server_processes import end, end_orphans, family, known_ports, leader, lost_servers, start, wait
from d3po.flows.server_programs import LOGIN, NAMES, POOL, WORKER, api_url, server_url, tracking_variables
from d3po.flows.server_stores import are_shared, read_stores, shown_stores
from d3po.flows.using_stores import use_stores
from d3po.tasks.tracking.views import TRAINING, saved_view, served_view
from d3po_core.errors import D3POError
from d3po_core.paths import data_folder
from d3po_core.store.databases import is_whole
from d3po_core.store.files import disk_errors

__all__ = ["down", "end_orphans", "find_prefect", "lost_servers", "mlflow_page", "prefect_url", "status", "up"]

PATIENCE = 5.0  # seconds to wait for Prefect's server when we can do without an answer


def up(
    prefect_port: int | None = None, mlflow_port: int | None = None, label_port: int | None = None,
    nightly: Sequence[str] = (), database: str | None = None, artifacts: str | None = None, anew: bool = False,
) -> list[str]:  # fmt: skip
    """Start the missing servers, deploy, and return lines to show; after a failure, end what it started.

    Args:
        prefect_port: port of the Prefect server; all ports stay as they are while any of the servers runs. By default
            the last one that was used.
        mlflow_port: port of the MLflow server.
        label_port: port of the labelling page.
        nightly: deployments that run every night from now on.
        database: PostgreSQL's address, or ``local`` for the data folder. By default the last one that was used.
        artifacts: where MLflow keeps files, ``s3://bucket/prefix`` or ``local``. By default the last place.
        anew: leave behind what the servers kept elsewhere until now.

    Raises:
        D3POError: a port is taken, the shell is set to another Prefect server, a server did not start, or the database
            or the bucket cannot be used.
    """
    given = {"prefect": prefect_port, "mlflow": mlflow_port, "label": label_port}
    chosen = {name: port for name, port in given.items() if port is not None}
    asked = PORTS | read_state().get("ports", {}) | chosen
    require_ports(asked)
    require_rounds(nightly)
    require_own_shell(api_url(asked | _ports_in_use()))
    deployments()  # a missing or damaged prefect.yaml ends this before anything starts
    if leader("prefect"):
        require_login(api_url(known_ports()))
    with one_at_a_time():
        missing = [name for name in NAMES if not leader(name)]
        stores = use_stores(database, artifacts, anew, missing)
        ports = asked | _ports_in_use()
        for name in [name for name in missing if name in ports]:
            end(family(name))  # the children of a killed server still hold its port
            require_free_port(name, ports[name])
        state = {**read_state(), "ports": ports}
        write_state(state)
        with _all_or_none(missing):
            lines = _start_missing(missing, ports, state)
    lines.append(f"started: {', '.join(missing)}" if missing else "everything is already running")
    lines += shown_stores(stores)
    lines += start_nightly(ports, nightly)
    if any(ports[name] != port for name, port in chosen.items()):
        lines.append("the ports stay as they were; type `d3po down` first to change them")
    return lines + _where_to_go(ports)


def down() -> list[str]:
    """End the servers, the worker first, restore the Prefect profile, and return lines to show."""
    with contextlib.ExitStack() as stack:
        if server_file("").is_dir():
            with contextlib.suppress(D3POError):  # a disk we cannot write must not keep servers running
                stack.enter_context(one_at_a_time())
        state = read_state()
        ended = _end_all()
        lines = ended + (restore_profile(state) if ended or "profile" in state else [])
        forget_all_but_ports()
    return lines or ["nothing to end: no servers are running"]


def status() -> list[str]:
    """Return a line per server: its state, its address and its log."""
    ports, running = known_ports(), {name: leader(name) for name in NAMES}
    lines = []
    for name, process in running.items():
        where = f" {server_url(ports, name)}" if process and name in ports else ""
        what = f"running{where} (pid {process.pid})" if process else "not running"
        lines.append(f"{name}: {what}, log {server_file(name + '.log')}")
    lines += _stores_lines()
    lines += [f"Prefect profile: {shown_profile()}", *(_how_to_log_in() if running["prefect"] else [])]
    return lines if all(running.values()) else [*lines, "type next: d3po up"]


def prefect_url() -> str | None:
    """API address of the Prefect server that ``up`` started, None if it does not run."""
    return api_url(known_ports()) if leader("prefect") else None


def find_prefect() -> bool:
    """Point this process to the server of ``d3po up``, unless the shell names another; return whether one is set.

    Links to MLflow then name the MLflow server of ``d3po up``, if it runs. With a shared database, results go there.
    """
    os.environ.update(without_proxy(os.environ))
    if leader("mlflow"):
        os.environ.setdefault("D3PO_MLFLOW_URL", server_url(known_ports(), "mlflow"))
    for name, value in tracking_variables(known_ports() if are_shared() else {}).items():
        os.environ.setdefault(name, value)
    if (url := prefect_url()) and is_ours(os.environ.setdefault("PREFECT_API_URL", url), url) and (known := login()):
        os.environ[LOGIN] = known
    return "PREFECT_API_URL" in os.environ


def _where_to_go(ports: Ports) -> list[str]:
    lines = [
        f"Prefect: {server_url(ports, 'prefect')}",
        _mlflow_line(server_url(ports, "mlflow")),
        f"Labelling page: {server_url(ports, 'label')} (d3po label --rater NAME prints a person's link)",
        owner_line(server_url(ports, "label")),
        *_how_to_log_in(),
    ]
    shell = psutil.Process().environ()  # the shell's own: `d3po` already bypasses proxies
    if is_proxied(shell):
        names = without_proxy(shell)["NO_PROXY"]
        lines.append(f"this shell has a proxy; plain `prefect` needs: export NO_PROXY={names}")
    return [*lines, "type next: prefect deployment run d3po/round -p rounds=2 --watch"]


def mlflow_page(key: str) -> str | None:
    """Address of a campaign's table of rounds on the MLflow server of ``up``; None if it does not run or has none.

    Args:
        key: the campaign's id.
    """
    view = _view(server_url(known_ports(), "mlflow"), key) if leader("mlflow") else None
    return server_url(known_ports(), "mlflow") + view[1] if view else None


def _mlflow_line(page: str) -> str:
    """MLflow's address: the newest campaign's table of rounds, or its list of experiments."""
    if view := _view(page):
        name, path = view
        return f"MLflow, {name}: {page}{path}"
    return f"MLflow: {page}/#/experiments{TRAINING}"


def _view(page: str, key: str | None = None) -> tuple[str, str] | None:
    return served_view(page, key) if are_shared() else saved_view(data_folder() / "mlflow" / "mlflow.db", key)


def _stores_lines() -> list[str]:
    try:
        return shown_stores(read_stores())
    except D3POError as error:
        return [str(error)]


def _how_to_log_in() -> list[str]:
    return [f"Prefect's page asks for a login: paste what {server_file(LOGIN_FILE)} holds"] if login() else []


def _start_missing(missing: list[str], ports: Ports, state: State) -> list[str]:
    """Start servers, the worker last, and deploy; return lines to show."""
    lines, key = [], make_login() if "prefect" in missing else login() or ""
    _make_stores(missing)
    for name in [name for name in missing if name in ports]:
        start(name, ports, key)
    wait("prefect", lambda: answers(f"{api_url(ports)}/health"))
    create_pool(ports)
    since = datetime.now(UTC)
    if "worker" in missing:
        lines += crash_lost_runs(ports)
        start("worker", ports, key)
    lines += deploy(ports, key)  # while the worker starts
    if "prefect" in missing:
        take_profile(api_url(ports), key, state)
    for name in ("mlflow", "label"):
        wait(name, partial(answers, f"{server_url(ports, name)}/health"))
    if "worker" in missing:
        wait("worker", lambda: _polls(ports, since))
    return lines


def _end_all() -> list[str]:
    """End every server; ask Prefect first to mark the runs that this cuts off.

    A Prefect server that does not answer is ended all the same. If the data folder is gone, so is the login.
    """
    lines, ports = [], known_ports()
    for name in reversed(NAMES):
        if name == "prefect" and leader(name) and login():
            try:
                lines += crash_lost_runs(ports, PATIENCE)
            except D3POError as error:
                lines.append(f"runs that were cut off are marked by the next `d3po up` ({error})")
        if processes := family(name):
            end(processes)
            lines.append(f"{name}: ended (pid {processes[0].pid})")
    return lines


@contextlib.contextmanager
def _all_or_none(names: list[str]) -> Iterator[None]:
    """End these servers again if the block fails, also by Ctrl-C."""
    try:
        yield
    except BaseException:
        for name in reversed(names):
            started = leader(name)
            # Keep the runs of a worker that was killed earlier.
            end(family(name) if name != "worker" else [started] if started else [])
        raise


def _make_stores(missing: list[str]) -> None:
    """Make the folders of the servers' databases, and complete MLflow's database before its server starts."""
    for folder in ("prefect", "mlflow/artifacts"):
        with disk_errors(data_folder() / folder, SET_DATA):
            (data_folder() / folder).mkdir(parents=True, exist_ok=True)
    with disk_errors(data_folder() / "prefect", SET_DATA):
        (data_folder() / "prefect").chmod(0o700)  # the login protects what its database holds
    if are_shared():
        return
    if "mlflow" in missing and not is_whole(data_folder() / "mlflow" / "mlflow.db", "experiments"):
        from d3po.tasks.tracking.store import make_local_store  # loads mlflow

        make_local_store()
    if "mlflow" in missing:
        from d3po.tasks.tracking.store import follow_local_store

        follow_local_store()


def _ports_in_use() -> Ports:
    return known_ports() if any(leader(name) for name in NAMES) else {}


def _polls(ports: Ports, since: datetime) -> bool:
    """Return whether our worker has polled since then; False if the server is too busy to answer."""
    workers: list[dict[str, Any]] = []
    with contextlib.suppress(D3POError):
        workers = ask(ports, "POST", f"/work_pools/{POOL}/workers/filter", {}, PATIENCE) or []
    beats = [worker["last_heartbeat_time"] for worker in workers if worker["name"] == WORKER]
    return any(beat and datetime.fromisoformat(beat) >= since for beat in beats)
