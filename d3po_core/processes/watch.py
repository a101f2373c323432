"""End a private Ray whose run was killed: Ray's own agents outlive a killed run by a minute or more.

    python -m d3po_core.processes.watch FOLDER

A process of its own, which waits until the run's end closes its standard input. Ray's processes are known by a variable
of their environment, which each of them gives to those that it starts, or by their open files.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import time

import psutil

MARK = "D3PO_RAY"
PATIENCE_SECONDS = 10.0


def start_watch(folder: str) -> "subprocess.Popen[bytes]":
    """Start the watcher of the Ray in ``folder``; it ends once its standard input is closed."""
    command = [sys.executable, "-m", "d3po_core.processes.watch", folder]
    environment = {name: value for name, value in os.environ.items() if name != MARK}
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True, env=environment)


def watch(folder: str) -> None:
    """Wait for the run's end, kill what is left of its Ray, and delete ``folder``."""
    sys.stdin.read()
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (left := _processes(folder)) and time.monotonic() < deadline:
        for process in left:
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=1.0)
    shutil.rmtree(folder, ignore_errors=True)


def _processes(folder: str) -> list[psutil.Process]:
    """Return Ray's living processes that were started after this one for the Ray in ``folder``."""
    since = psutil.Process().create_time()
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.create_time() >= since and process.status() != psutil.STATUS_ZOMBIE and _is_of(process, folder):
                found.append(process)
    return found


def _is_of(process: psutil.Process, folder: str) -> bool:
    if process.environ().get(MARK) == folder:
        return True
    # Ray gives some processes a title, which overwrites their environment; they write their logs into the folder.
    return process.name().startswith("ray") and any(file.path.startswith(folder) for file in process.open_files())


if __name__ == "__main__":
    watch(sys.argv[1])
