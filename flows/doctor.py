"""The doctor's checks of servers and ports; those of the machine are in ``d3po_core.machine.health``."""

from collections.abc import Iterator

from d3po.flows.prefect_api import answers
from d3po.flows.server_bucket import require_bucket
from d3po.flows.server_checks import require_free_port, require_own_shell
from d3po.flows.server_database import require_database
from d3po.flows.server_files import PORTS, Ports, server_file
from d3po.flows.server_processes import known_ports, leader
from d3po.flows.server_programs import NAMES, api_url, server_url
from d3po.flows.server_stores import read_stores, server_of
from d3po_core.errors import D3POError
from d3po_core.machine.health import CHECKS, Check

USUAL_PORTS: Ports = {"prefect": 4200, "mlflow": 5000, "label": 8700}  # as the options of `d3po up`


def examine() -> Iterator[Check]:
    """All checks in turn; each is made when it is asked for."""
    yield from (check() for check in CHECKS)
    try:
        ports = USUAL_PORTS | known_ports()
    except D3POError:  # without a data folder, which the disk's check has said
        return
    for name in PORTS:
        yield check_server(name, ports)
    yield check_worker()
    yield from check_stores()
    yield check_shell(ports)


def check_server(name: str, ports: Ports) -> Check:
    """Whether a server answers if it runs, and else whether its port is free."""
    if leader(name) is None:
        try:
            require_free_port(name, ports[name])
        except D3POError as error:
            found, _, remedy = str(error).rpartition("; ")
            return Check(name, "warn", found, remedy)
        if any(map(leader, NAMES)):
            return Check(name, "warn", "does not run, but other servers do", "type `d3po up`")
        return Check(name, "ok", f"not running; port {ports[name]} is free")
    health = f"{api_url(ports) if name == 'prefect' else server_url(ports, name)}/health"
    if answers(health):
        return Check(name, "ok", f"runs and answers on port {ports[name]}")
    remedy = f"see {server_file(name + '.log')}, then `d3po down` and `d3po up`"
    return Check(name, "fail", f"runs, and does not answer {health}", remedy)


def check_worker() -> Check:
    """Whether the worker runs where Prefect's server does; without it no scheduled run starts."""
    if leader("worker"):
        return Check("worker", "ok", "runs")
    if leader("prefect"):
        return Check("worker", "fail", "does not run, but Prefect's server does; no run will start", "type `d3po up`")
    return Check("worker", "ok", "not running")


def check_stores() -> Iterator[Check]:
    """Whether a shared database and bucket are ready; nothing if the servers use the data folder."""
    try:
        if not (stores := read_stores()):
            return
        yield Check("database", "ok", f"PostgreSQL {require_database(stores)}, {server_of(stores)}")
    except D3POError as error:
        yield _failed("database", error)
        return
    if "artifacts" in stores:
        try:
            require_bucket(stores)
            yield Check("artefacts", "ok", f"can be written to {stores['artifacts']}")
        except D3POError as error:
            yield _failed("artefacts", error)


def _failed(name: str, error: D3POError) -> Check:
    found, _, remedy = str(error).rpartition("; ")
    return Check(name, "fail", found, remedy)


def check_shell(ports: Ports) -> Check:
    """Whether plain ``prefect`` commands of this shell would reach our server."""
    try:
        require_own_shell(api_url(ports))
    except D3POError as error:
        found, _, remedy = str(error).rpartition("; ")
        return Check("shell", "warn", found, remedy)
    return Check("shell", "ok", "no variable points to another Prefect server")
