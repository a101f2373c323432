"""Private files of ``d3po up`` in ``<data folder>/servers``: ports, the login, logs, a lock."""

import contextlib
import json
import os
import secrets
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from d3po_core.errors import D3POError
from d3po_core.paths import data_folder
from d3po_core.store.files import atomic_path, disk_errors, exclusive

SET_DATA = "or set D3PO_DATA to another folder"
STATE, LOGIN_FILE = "servers.json", "prefect-login"
SERVER_LOGIN = "PREFECT_SERVER_API_AUTH_STRING"  # Prefect's own variable, for users who set their own login
PORTS = {"prefect": 4200, "mlflow": 5000, "label": 8700}  # until `up` is told others

Ports = dict[str, int]
State = dict[str, Any]


def server_file(name: str) -> Path:
    """Path of a file in the servers' folder."""
    return data_folder() / "servers" / name


def make_folder() -> None:
    """Make the servers' folder, and make it and all files in it private.

    Raises:
        D3POError: the data folder cannot be written.
    """
    folder = server_file("")
    with disk_errors(server_file(STATE), SET_DATA):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder.chmod(0o700)
        for file in folder.iterdir():
            if file.is_file():
                file.chmod(0o600)


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Let only one ``up`` or ``down`` per data folder work; others wait for it.

    Raises:
        D3POError: the data folder cannot be written, or does not support locks.
    """
    make_folder()
    lock = server_file(".lock")
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(exclusive(lock, mode=0o600, wait=False))
        except BlockingIOError:
            print("d3po: another `d3po up` or `d3po down` is at work; waiting for it", file=sys.stderr)
            stack.enter_context(exclusive(lock, mode=0o600))
        yield


def read_state() -> State:
    """Read what we remembered: ``ports``, ``profile``, and an earlier version's ``processes``.

    A damaged file counts as empty. Nothing depends on it: the servers' processes tell which run, and where.
    """
    try:
        found = json.loads(server_file(STATE).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return _well_formed(found) if isinstance(found, dict) else {}


def write_state(state: State) -> None:
    """Remember the state for the next command.

    Raises:
        D3POError: the folder cannot be written.
    """
    file = server_file(STATE)
    if file.is_dir():
        raise D3POError(f"{file} is a folder, where `d3po up` keeps a file; move it away")
    with atomic_path(file, SET_DATA, private=True) as temporary:
        temporary.touch(mode=0o600)
        temporary.write_text(json.dumps(state, indent=2))


def forget_all_but_ports() -> None:
    """Forget what concerns running servers; the next ``up`` uses the same ports."""
    ports = read_state().get("ports")
    with contextlib.suppress(OSError, D3POError):  # a disk we cannot write must not keep `down` from its end
        if ports:
            write_state({"ports": ports})
        else:
            server_file(STATE).unlink(missing_ok=True)


def open_log(name: str) -> int:
    """Open a server's log to append to, readable by its owner only; return the descriptor.

    Raises:
        D3POError: it cannot be written.
    """
    file = server_file(f"{name}.log")
    with disk_errors(file, SET_DATA):
        return os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)


def login() -> str | None:
    """The login of the Prefect server of ``d3po up``, ``NAME:PASSWORD``; None if there is none.

    Raises:
        D3POError: the file exists but cannot be read.
    """
    file = server_file(LOGIN_FILE)
    try:
        return file.read_text().strip() or None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise D3POError(
            f"{file} cannot be read ({error}); make it readable, or type `d3po down` and remove it"
        ) from None


def make_login() -> str:
    """The login for a new Prefect server: the shell's, else the data folder's, else a new one.

    Raises:
        D3POError: it cannot be stored.
    """
    found = os.environ.get(SERVER_LOGIN) or login() or f"d3po:{secrets.token_urlsafe(24)}"
    if found != login():
        file = server_file(LOGIN_FILE)
        with atomic_path(file, SET_DATA, private=True) as temporary:
            temporary.touch(mode=0o600)  # private from its first byte
            temporary.write_text(found + "\n")
    return found


def _well_formed(found: dict[str, Any]) -> State:
    """Keep only the well-formed fields."""
    state: State = {}
    ports = found.get("ports")
    if isinstance(ports, dict):
        state["ports"] = {name: ports[name] for name in PORTS if _is_number(ports.get(name), 65535)}
    processes = found.get("processes")
    if isinstance(processes, dict):
        pids = {name: record.get("pid") for name, record in processes.items() if isinstance(record, dict)}
        state["processes"] = {name: {"pid": pid} for name, pid in pids.items() if _is_number(pid, 2**31)}
    if isinstance(found.get("profile"), str):
        state["profile"] = found["profile"]
    return state


def _is_number(value: Any, below: int) -> bool:
    return type(value) is int and 0 < value <= below
