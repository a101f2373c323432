"""A worker's runs as forks of one process that has imported all. Not a test by itself.

A deployment's command is this file and a socket. Started by the worker, it hands its environment, folder and output
over to the warm process, and ends as the forked run does. Tests of the worker's own command do not use this.
"""

import json
import os
import runpy
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def warm_runs(address: Path, environment: dict[str, str]) -> Iterator[str]:
    """The command of a deployment whose runs are forked; the warm process listens at the address meanwhile."""
    command = [sys.executable, "-m", "tests.flows.warm_runs", str(address)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as warm:
        assert warm.stdout
        assert warm.stdout.readline() == "ready\n"
        try:
            yield shlex.join([sys.executable, "-S", __file__, str(address)])
        finally:
            warm.kill()


def run_elsewhere(address: str) -> int:
    """Have the warm process do what `python -m prefect.engine` would do here; its exit code, 1 if it was killed."""
    with socket.socket(socket.AF_UNIX) as warm:
        warm.connect(address)
        socket.send_fds(warm, [b" "], [1, 2])
        warm.sendall(json.dumps([dict(os.environ), os.getcwd()]).encode())
        warm.shutdown(socket.SHUT_WR)
        return int(warm.makefile().read() or 1)


def serve(address: str) -> None:
    """Fork a run for each caller; a caller waits until its run's process is gone."""
    import tests.flows.warm  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        print("ready", flush=True)
        while True:
            caller, _ = listener.accept()
            if not os.fork():
                listener.close()
                sys.exit(_run(caller))
            caller.close()


def _run(caller: socket.socket) -> Any:
    """Become the caller's process as far as a run can tell, and run."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, outputs, _, _ = socket.recv_fds(caller, 1, 2)
    for number, output in enumerate(outputs, start=1):
        os.dup2(output, number)
    environment, folder = json.load(caller.makefile())
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = ["prefect.engine"]
    code: Any = 1
    try:
        runpy.run_module("prefect.engine", run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code or 0
    finally:
        caller.sendall(str(code).encode())
    return code


if __name__ == "__main__":
    if __spec__ is None:  # started by its path: imports nothing of the project
        sys.exit(run_elsewhere(sys.argv[1]))
    serve(sys.argv[1])
