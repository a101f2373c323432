"""How busy one GPU is, noted five times a second beside a benchmark, and asked for afterwards by stretch of time."""

import contextlib
import csv
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

INTERVAL_SECONDS = 0.2


@dataclass(frozen=True)
class Usage:
    """What was seen at one moment.

    Attributes:
        at: seconds since 1970.
        busy: share of the driver's last sampling period in which a kernel ran, 0 to 1.
        memory_gb: memory in use on the card, of all processes, GB.
    """

    at: float
    busy: float
    memory_gb: float


@contextlib.contextmanager
def watching(path: Path) -> Iterator[bool]:
    """Append what the first visible GPU does to a CSV file until the block ends; gives whether there is one to watch.

    Asks NVML if ``pynvml`` is there, else ``nvidia-smi``; with neither it notes nothing.
    """
    moments = _nvml() or _nvidia_smi()
    if moments is None:
        yield False
        return
    ended = threading.Event()
    thread = threading.Thread(target=_note, args=(moments, path, ended), daemon=True)
    thread.start()
    try:
        yield True
    finally:
        ended.set()
        thread.join(timeout=5)


def read_usage(path: Path) -> list[Usage]:
    """What was noted so far, in order."""
    if not path.exists():
        return []
    with path.open(newline="") as stream:
        return [Usage(*map(float, row)) for row in csv.reader(stream) if len(row) == 3]


def between(usage: list[Usage], start: float, end: float) -> dict[str, float] | None:
    """Mean busy share, and most memory, of a stretch of time; None if nothing was noted in it."""
    seen = [moment for moment in usage if start <= moment.at <= end]
    if not seen:
        return None
    return {
        "busy": sum(moment.busy for moment in seen) / len(seen),
        "memory_gb": max(moment.memory_gb for moment in seen),
        "moments": len(seen),
    }


def _note(moments: Generator[Usage], path: Path, ended: threading.Event) -> None:
    with path.open("a", newline="", buffering=1) as stream, contextlib.closing(moments):
        for moment in moments:
            stream.write(f"{moment.at:.3f},{moment.busy:.2f},{moment.memory_gb:.3f}\n")
            if ended.is_set():
                return


def _first_visible() -> int:
    """The number that the driver gives to the GPU that CUDA calls 0."""
    return int(os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or 0)


def _nvml() -> Generator[Usage] | None:
    try:
        import pynvml

        pynvml.nvmlInit()
        card = pynvml.nvmlDeviceGetHandleByIndex(_first_visible())
    except Exception:  # no module, no driver or no card, each with an error of its own
        return None

    def ask() -> Generator[Usage]:
        while True:
            rates, memory = pynvml.nvmlDeviceGetUtilizationRates(card), pynvml.nvmlDeviceGetMemoryInfo(card)
            yield Usage(time.time(), rates.gpu / 100, memory.used / 1e9)
            time.sleep(INTERVAL_SECONDS)

    return ask()


def _nvidia_smi() -> Generator[Usage] | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None

    def ask() -> Generator[Usage]:
        command = [
            program, f"--id={_first_visible()}", "--query-gpu=utilization.gpu,memory.used",
            "--format=csv,noheader,nounits", f"--loop-ms={INTERVAL_SECONDS * 1000:.0f}",
        ]  # fmt: skip
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        try:
            for line in process.stdout:
                busy, mebibytes = (float(field) for field in line.split(","))
                yield Usage(time.time(), busy / 100, mebibytes * 2**20 / 1e9)
        finally:
            process.kill()
            process.wait()

    return ask()
