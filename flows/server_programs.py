"""How to start and reach each server: command line, environment, address."""

import os
import secrets
import sys

from d3po.flows.loopback import HOST, without_proxy
from d3po.flows.server_files import SERVER_LOGIN, Ports
from d3po_core.paths import PROJECT_ROOT, data_folder
from d3po_core.store.databases import sqlite_url

NAMES = ("prefect", "mlflow", "label", "worker")
POOL = "d3po"
WORKER = "d3po-worker"
MARK = "D3PO_SERVER"  # in a process's environment: the server that it is, or that started it
LOGIN = "PREFECT_API_AUTH_STRING"
DATABASE = "PREFECT_SERVER_DATABASE_CONNECTION_URL"
PREFECT = (sys.executable, "-m", "prefect", "--no-prompt")
WORKER_PROGRAM = (sys.executable, "-m", "d3po.tasks.worker", "--no-prompt")
QUIET = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "TRANSFORMERS_VERBOSITY": "error",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
}
# The shell's values may point to another Prefect server, or hold a login that not every server may see.
LEFT_OUT = ("PREFECT_PROFILE", "PREFECT_PROFILES_PATH", LOGIN, SERVER_LOGIN, MARK)


def server_url(ports: Ports, name: str) -> str:
    """Address of a server."""
    return f"http://{HOST}:{ports[name]}"


def training_page(ports: Ports) -> str:
    """Address of MLflow's page for training runs; it opens another one without the parameter."""
    return f"{server_url(ports, 'mlflow')}/#/experiments?workflowType=machine_learning"


def api_url(ports: Ports) -> str:
    """Address of the Prefect server's API."""
    return f"{server_url(ports, 'prefect')}/api"


def own_addresses(port: int) -> list[str]:
    """The origins of a server's own pages."""
    return [f"http://{name}:{port}" for name in (HOST, "localhost")]


def client_environment(ports: Ports, login: str) -> dict[str, str]:
    """Environment of a client of our servers: the shell's without its Prefect server, plus ours."""
    kept = {key: value for key, value in os.environ.items() if key not in LEFT_OUT}
    return kept | QUIET | without_proxy(os.environ) | {
        "D3PO_DATA": str(data_folder()),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(PROJECT_ROOT), os.environ.get("PYTHONPATH")))),
        "PREFECT_HOME": str(data_folder() / "prefect"),
        "PREFECT_API_URL": api_url(ports),
        DATABASE: _prefect_database(),
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "D3PO_LABEL_URL": server_url(ports, "label"),
        "D3PO_MLFLOW_URL": server_url(ports, "mlflow"),
        LOGIN: login,
    }  # fmt: skip


def temporary_environment() -> dict[str, str]:
    """Settings of one ``d3po run``'s temporary server: a login that only this run knows, and no foreign pages.

    The server writes to the database of ``d3po up``, whose worker would carry out its orders.
    """
    key = os.environ.get(SERVER_LOGIN) or f"d3po:{secrets.token_urlsafe(24)}"
    return {
        LOGIN: key, SERVER_LOGIN: key, "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"http://{HOST}",
        DATABASE: os.environ.get(DATABASE) or _prefect_database(),
    }  # fmt: skip


def server_environment(name: str, ports: Ports, login: str) -> dict[str, str]:
    """Environment of a server, marked with its name; each admits only its own pages."""
    environment = client_environment(ports, login) | {MARK: name}
    if name == "prefect":
        return environment | {
            SERVER_LOGIN: login, "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": ",".join(own_addresses(ports["prefect"])),
        }  # fmt: skip
    if name == "mlflow":
        del environment[LOGIN]
        return environment | {"MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE": "false"}
    return environment


def server_command(name: str, ports: Ports) -> list[str]:
    """Command line of a server. It holds no secret, because all users can read it."""
    if name == "worker":
        return [*WORKER_PROGRAM, "worker", "start", "--pool", POOL, "--name", WORKER, "--type", "process"]
    address = ["--host", HOST, "--port", str(ports[name])]
    if name == "prefect":
        return [sys.executable, "-m", "d3po.flows.prefect_server", str(ports[name])]
    if name == "label":
        return [sys.executable, "-c", "from d3po.flows.commands.line import main; main()", "label", *address]
    folder, origins = data_folder() / "mlflow", own_addresses(ports["mlflow"])
    stores = [
        "--backend-store-uri", sqlite_url(folder / "mlflow.db"),
        "--artifacts-destination", (folder / "artifacts").as_uri(),
    ]  # fmt: skip
    hosts = ",".join(origin.removeprefix("http://") for origin in origins)
    guard = ["--allowed-hosts", hosts, "--cors-allowed-origins", ",".join(origins)]
    return [sys.executable, "-m", "mlflow", "server", *address, "--workers", "1", *stores, *guard]


def _prefect_database() -> str:
    return sqlite_url(data_folder() / "prefect" / "prefect.db", "sqlite+aiosqlite")
