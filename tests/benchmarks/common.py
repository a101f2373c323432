"""What the benchmarks share: the machine they ran on, medians with their spread, and one JSON file each."""

import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from d3po_core.paths import PROJECT_ROOT

RESULTS = PROJECT_ROOT / "benchmark-results"
LIBRARIES = ("torch", "diffusers", "peft", "transformers", "accelerate", "duckdb", "pyarrow", "prefect", "mlflow")

Spread = dict[str, float]

# Before anything imports transformers, which otherwise warns that torchvision is missing.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def machine() -> dict[str, Any]:
    """CPU, cores that this process may use, memory, and versions; nothing that names the machine."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "load_before": os.getloadavg()[0],
        "system": platform.system(),
        "python": platform.python_version(),
        "libraries": {name: version for name in LIBRARIES if (version := _version(name))},
        "commit": _commit(),
    }


def spread(values: Iterable[float]) -> Spread:
    """Median, smallest and largest of repeated measurements."""
    found = list(values)
    return {"median": statistics.median(found), "min": min(found), "max": max(found), "repeats": len(found)}


def show(measured: Spread, digits: int = 1) -> str:
    """A spread as text: median [min, max]."""
    median, low, high = (f"{measured[key]:,.{digits}f}" for key in ("median", "min", "max"))
    return f"{median} [{low}, {high}]"


def write_json(path: Path, settings: dict[str, Any], machine: dict[str, Any], results: dict[str, Any]) -> None:
    """Write a benchmark's result; ``machine`` is taken before the measurement, so that its load is the others'."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shown = {key: value for key, value in settings.items() if not isinstance(value, Path)}
    measured_at = datetime.now(UTC).isoformat(timespec="seconds")
    record = {"measured_at": measured_at, "settings": shown, "machine": machine, **results}
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"JSON: {os.path.relpath(path)}")


def clean_environment(data: Path) -> dict[str, str]:
    """Environment for a ``d3po`` of its own: its data in ``data``, no server or tracking of the user's."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_", "D3PO_"))}
    return kept | {"D3PO_DATA": str(data.resolve())}


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:  # a machine that only computes has no Prefect
        return None


def _commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
