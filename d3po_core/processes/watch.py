"""End a private Ray whose run was killed: Ray's own agents outlive a killed run by a minute or more.

    python -m d3po_core.processes.watch FOLDER

A process of its own, which waits until the run's end closes its standard input.
"""

import contextlib
import os
import select
import shutil
import subprocess
import sys

import psutil

LOOK_EVERY_SECONDS = 1.0


def start_watch(folder: str) -> "subprocess.Popen[bytes]":
    """Start the watcher of the Ray in ``folder``; it ends once its standard input is closed."""
    command = [sys.executable, "-m", "d3po_core.processes.watch", folder]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def watch(folder: str) -> None:
    """Remember Ray's processes while the run lives; kill those that are left after it, and delete ``folder``."""
    run = psutil.Process(os.getppid())
    known: set[psutil.Process] = set()
    while not select.select([sys.stdin], [], [], LOOK_EVERY_SECONDS)[0]:
        with contextlib.suppress(psutil.Error):
            for child in run.children():
                if folder in " ".join(child.cmdline()):
                    known |= {child, *child.children(recursive=True)}
    for process in known:
        with contextlib.suppress(psutil.Error):
            process.kill()  # psutil compares the start time, so never a process that got the number since
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    watch(sys.argv[1])
