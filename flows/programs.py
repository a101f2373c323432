"""Run programs to their end, and report a failure in one line."""

import subprocess
from pathlib import Path

from d3po_core.errors import D3POError


def run_program(command: list[str], environment: dict[str, str], folder: Path) -> None:
    """Run a program to its end in a folder.

    Raises:
        D3POError: it failed; the message has its output.
    """
    done = subprocess.run(
        command, env=environment, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if done.returncode:
        said = " ".join((done.stdout + done.stderr).rpartition("╯")[2].split())
        raise D3POError(f"`{' '.join(command[1:])}` failed: {said[-500:]}")
