"""Run programs to their end, and report a failure in one line."""

import subprocess

from d3po_core.errors import D3POError
from d3po_core.paths import PROJECT_ROOT


def run_program(command: list[str], environment: dict[str, str]) -> None:
    """Run a program to its end.

    Raises:
        D3POError: it failed; the message has its output.
    """
    done = subprocess.run(
        command, env=environment, cwd=PROJECT_ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if done.returncode:
        said = " ".join((done.stdout + done.stderr).rpartition("╯")[2].split())
        raise D3POError(f"`{' '.join(command[1:])}` failed: {said[-500:]}")
