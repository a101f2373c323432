"""Checks that ``d3po up`` makes before it starts anything."""

import os
import socket

from d3po.flows.loopback import HOST
from d3po.flows.prefect_profile import PROFILE
from d3po.flows.server_files import LOGIN_FILE, SERVER_LOGIN, Ports, login, server_file
from d3po.flows.server_processes import who_listens
from d3po.flows.server_programs import LOGIN
from d3po_core.errors import D3POError
from d3po_core.paths import data_folder


def require_ports(ports: Ports) -> None:
    """Refuse invalid ports, and two servers on one port.

    Raises:
        D3POError: a port is invalid or given twice.
    """
    for name, port in ports.items():
        if not 0 < port < 65536:
            raise D3POError(f"port {port} for {name}: expected 1 to 65535; type `d3po up --{name}-port <a free port>`")
        if twin := next((other for other in ports if other != name and ports[other] == port), None):
            raise D3POError(
                f"port {port} is given for both {name} and {twin}; each needs one of its own: "
                f"type `d3po up --{twin}-port <a free port>`"
            )


def require_own_shell(api: str) -> None:
    """Refuse a shell whose ``prefect`` commands would not reach our server.

    Args:
        api: the server's address.

    Raises:
        D3POError: the shell names another address, profile or login.
    """
    for name, expected in (("PREFECT_API_URL", api), ("PREFECT_PROFILE", PROFILE)):
        found = os.environ.get(name)
        if found and not is_ours(found, expected):
            raise D3POError(
                f"{name} is set to {found!r}, so `prefect` in this shell would not reach the server of `d3po up` at "
                f"{api}; type `unset {name}`, then `d3po up` (or leave `d3po up` out and deploy to your own server)"
            )
    known = os.environ.get(SERVER_LOGIN) or login()
    if (found := os.environ.get(LOGIN)) and found != known:
        raise D3POError(
            f"{LOGIN} is set, so `prefect` in this shell would give the server of `d3po up` a wrong login; "
            f"type `unset {LOGIN}`, or set {SERVER_LOGIN} to the same, then `d3po down` and `d3po up`"
        )


def is_ours(found: str, expected: str) -> bool:
    """Return whether an address that somebody wrote is the expected one of ours."""
    return found.rstrip("/").replace("localhost", HOST) == expected


def require_free_port(name: str, port: int) -> None:
    """Refuse a port that another program holds, or that only root may use.

    Raises:
        D3POError: the port cannot be used; the message names its holder if it is visible.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            by = f" by {who}" if (who := who_listens(port)) else ""
            raise D3POError(
                f"port {port} for {name} cannot be used ({error.strerror}{by}); "
                f"for another port, type `d3po up --{name}-port <a free port>`"
            ) from None


def require_login(api: str) -> None:
    """Refuse to go on with a running Prefect server whose login is gone.

    Args:
        api: the server's address.

    Raises:
        D3POError: the data folder was removed or replaced since the servers started.
    """
    if not server_file(LOGIN_FILE).exists():
        raise D3POError(
            f"a Prefect server for data folder {data_folder()} runs at {api}, but {server_file(LOGIN_FILE)} is gone: "
            "the folder was removed or replaced; type `d3po down`, then `d3po up`"
        )
