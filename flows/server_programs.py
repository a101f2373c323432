"""How to start and reach each server: command line, environment, address."""

import os
import secrets
import sys

from d3po.flows.loopback import HOST, without_proxy
from d3po.flows.server_files import SERVER_LOGIN, Ports
from d3po.flows.server_stores import DATABASE as SHARED
from d3po.flows.server_stores import PASSWORD, Stores, are_shared, read_stores, store_url, store_variables
from d3po_core.paths import data_folder, project_folder, python_path
from d3po_core.store.databases import sqlite_url

NAMES = ("prefect", "mlflow", "label", "worker")
POOL = "d3po"
WORKER = "d3po-worker"
MARK = "D3PO_SERVER"  # in a process's environment: the server that it is, or that started it
LOGIN = "PREFECT_API_AUTH_STRING"
DATABASE = "PREFECT_SERVER_DATABASE_CONNECTION_URL"
TRACKING = "MLFLOW_TRACKING_URI"
PYTHON = (sys.executable, "-P")  # the project's own files must not stand in for modules
PREFECT = (*PYTHON, "-m", "prefect", "--no-prompt")
WORKER_PROGRAM = (*PYTHON, "-m", "d3po.tasks.worker", "--no-prompt")
QUIET = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "TRANSFORMERS_VERBOSITY": "error",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
}
# The shell's values may point to another Prefect server, or hold a login that not every server may see.
LEFT_OUT = ("PREFECT_PROFILE", "PREFECT_PROFILES_PATH", LOGIN, SERVER_LOGIN, MARK, SHARED)


def server_url(ports: Ports, name: str) -> str:
    """Address of a server."""
    return f"http://{HOST}:{ports[name]}"


def api_url(ports: Ports) -> str:
    """Address of the Prefect server's API."""
    return f"{server_url(ports, 'prefect')}/api"


def own_addresses(port: int) -> list[str]:
    """The origins of a server's own pages."""
    return [f"http://{name}:{port}" for name in (HOST, "localhost")]


def client_environment(ports: Ports, login: str) -> dict[str, str]:
    """Environment of a client of our servers: the shell's without its Prefect server, plus ours."""
    left_out = (*LEFT_OUT, PASSWORD) if are_shared() else LEFT_OUT  # only the database's own clients need it
    kept = {key: value for key, value in os.environ.items() if key not in left_out}
    return tracking_variables(ports) | kept | QUIET | without_proxy(os.environ) | {
        "D3PO_DATA": str(data_folder()),
        "D3PO_PROJECT": str(project_folder()),
        "PYTHONPATH": python_path(),
        "PREFECT_HOME": str(data_folder() / "prefect"),
        "PREFECT_API_URL": api_url(ports),
        **_prefect_database({}),
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "D3PO_LABEL_URL": server_url(ports, "label"),
        "D3PO_MLFLOW_URL": server_url(ports, "mlflow"),
        LOGIN: login,
    }  # fmt: skip


def tracking_variables(ports: Ports) -> dict[str, str]:
    """With a shared database, results go through MLflow's server: only it knows the password and the bucket's key."""
    return {TRACKING: server_url(ports, "mlflow")} if are_shared() and "mlflow" in ports else {}


def temporary_environment() -> dict[str, str]:
    """Settings of one ``d3po run``'s temporary server: a login that only this run knows, and no foreign pages.

    The server writes to the database of ``d3po up``, whose worker would carry out its orders.

    Raises:
        D3POError: that database is a shared one, and the file that names it is damaged.
    """
    stores = read_stores()
    key = os.environ.get(SERVER_LOGIN) or f"d3po:{secrets.token_urlsafe(24)}"
    return {
        LOGIN: key, SERVER_LOGIN: key, "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"http://{HOST}",
        **({DATABASE: os.environ[DATABASE]} if os.environ.get(DATABASE) else _prefect_database(stores)),
    }  # fmt: skip


def server_environment(name: str, ports: Ports, login: str) -> dict[str, str]:
    """Environment of a server, marked with its name; each admits only its own pages."""
    environment = client_environment(ports, login) | {MARK: name}
    if name == "prefect":
        return environment | _prefect_database(read_stores()) | {
            SERVER_LOGIN: login, "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": ",".join(own_addresses(ports["prefect"])),
            # Else `--watch` shows events alone, and neither rounds nor scores.
            "PREFECT_SERVER_LOGS_STREAM_OUT_ENABLED": "true", "PREFECT_SERVER_LOGS_STREAM_PUBLISHING_ENABLED": "true",
        }  # fmt: skip
    if name == "mlflow":
        for not_its_own in (LOGIN, TRACKING):
            environment.pop(not_its_own, None)
        stores = read_stores()
        return environment | (store_variables(stores) if stores else {}) | {
            "MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE": "false"
        }  # fmt: skip
    return environment


def server_command(name: str, ports: Ports) -> list[str]:
    """Command line of a server. It holds no secret, because all users can read it."""
    if name == "worker":
        return [*WORKER_PROGRAM, "worker", "start", "--pool", POOL, "--name", WORKER, "--type", "process"]
    address = ["--host", HOST, "--port", str(ports[name])]
    if name == "prefect":
        return [*PYTHON, "-m", "d3po.flows.prefect_server", str(ports[name])]
    if name == "label":
        return [*PYTHON, "-c", "from d3po.flows.commands.line import main; main()", "label", *address]
    folder, origins, shared = data_folder() / "mlflow", own_addresses(ports["mlflow"]), read_stores()
    stores = [
        "--backend-store-uri", store_url(shared, "mlflow") if shared else sqlite_url(folder / "mlflow.db"),
        "--artifacts-destination", shared.get("artifacts") or (folder / "artifacts").as_uri(),
    ]  # fmt: skip
    hosts = ",".join(origin.removeprefix("http://") for origin in origins)
    guard = ["--allowed-hosts", hosts, "--cors-allowed-origins", ",".join(origins)]
    return [*PYTHON, "-m", "mlflow", "server", *address, "--workers", "1", *stores, *guard]


def _prefect_database(stores: Stores) -> dict[str, str]:
    """Variables with which a Prefect server finds its database."""
    if stores:
        return {DATABASE: store_url(stores, "prefect"), **store_variables(stores)}
    return {DATABASE: sqlite_url(data_folder() / "prefect" / "prefect.db", "sqlite+aiosqlite")}
