"""A Prefect server of the tests' own, and processes that run rounds on it and can be killed.

One for the whole session: the process that the others are forked from keeps the environment it was started in.
"""

import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

QUIET = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "TRANSFORMERS_VERBOSITY": "error",
}


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment in which Prefect and the data folder are the tests' own, with a real server running."""
    folder = tmp_path_factory.mktemp("prefect")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **QUIET,
        "PREFECT_HOME": str(folder / "home"),
        "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
        "D3PO_DATA": str(folder / "data"),
    }
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(command, env={**os.environ, **environment}, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 120
        while True:
            assert server.poll() is None, (folder / "server.log").read_text()
            assert time.monotonic() < deadline, "the Prefect server did not answer in 120 s"
            try:
                if httpx.get(f"{environment['PREFECT_API_URL']}/health", trust_env=False).is_success:
                    break
            except httpx.HTTPError:
                time.sleep(0.3)
        yield environment
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="session")
def run_rounds(prefect_server: dict[str, str]) -> Iterator[Callable[..., int]]:
    """Run the flow in a process of its own; gives its exit code, negative for the signal that ended it."""
    before = {name: os.environ.get(name) for name in prefect_server}
    os.environ.update(prefect_server)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.flows.warm"])

    def run(
        values: dict[str, Any], rounds: int, kill_at: int | str | None = None, after: bool = False,
        kill_rank_in: str | None = None,
    ) -> int:  # fmt: skip
        from tests.flows.rounds_in_processes import run_rounds as target

        process = context.Process(target=target, args=(values, rounds, kill_at, after, kill_rank_in))
        process.start()
        process.join(300)
        assert process.exitcode is not None, "the rounds did not end in 300 s"
        return process.exitcode

    yield run
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


@pytest.fixture(scope="session")
def data(prefect_server: dict[str, str]) -> Path:
    """The data folder of the tests' campaigns."""
    return Path(prefect_server["D3PO_DATA"])
