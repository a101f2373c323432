"""Checks of this machine for ``d3po doctor``: each returns what it found and, unless all is well, the remedy."""

import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Literal

from packaging.requirements import Requirement

from d3po_core.errors import D3POError
from d3po_core.machine.gpus import find_driver, torch_build, why_no_gpu
from d3po_core.machine.hub import hub_cache
from d3po_core.paths import PROJECT_ROOT, data_folder

State = Literal["ok", "warn", "fail"]
TRIED_PYTHONS = ((3, 11), (3, 13))
LOW_DISK, LOW_GPU_MEMORY = 10e9, 3e9  # bytes: a few rounds of Stable Diffusion; its training in the mode `small`
CONSTRAINTS = PROJECT_ROOT / "constraints.txt"
# What goes wrong with versions outside our requirements. Pip checks them only when it installs d3po.
BREAKS = {
    "fastapi": "breaks Prefect 3.8's server",
    "sqlalchemy": "makes Prefect's scheduler create no runs",
    "torch": "has not been tried",
}
NAMED = 4


@dataclass(frozen=True)
class Check:
    """One line of the doctor: what was looked at, how it is, what was found, and what to do about it."""

    name: str
    state: State
    found: str
    remedy: str = ""


def check_python() -> Check:
    """Return whether this Python is one that was tried."""
    oldest, newest = TRIED_PYTHONS
    found = f"Python {sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}"
    if sys.version_info[:2] < oldest:
        return Check("Python", "fail", found, "make the virtual environment with Python 3.11, 3.12 or 3.13")
    if sys.version_info[:2] > newest:
        return Check("Python", "warn", found, "not tried; if something fails, use Python 3.11, 3.12 or 3.13")
    return Check("Python", "ok", found)


def check_torch() -> Check:
    """Return whether torch's build fits the GPU and its driver."""
    driver, build = find_driver(), torch_build()
    if build is None:
        return Check("torch", "fail", "torch is not installed", "install d3po again, with its dependencies")
    made_for = f"CUDA {build.cuda}" if build.cuda else f"ROCm {build.rocm}" if build.rocm else "the CPU"
    found = f"torch {build.version}, built for {made_for}"
    if missing := why_no_gpu(driver, build):
        if missing.broken:
            return Check("torch", "fail", missing.why, missing.remedy)
        remedy = "the embedded model needs no GPU; real models need an NVIDIA GPU"
        return Check("torch", "warn", f"{found}; no GPU: {missing.why}", remedy)
    return Check("torch", "ok", f"{found}; driver up to CUDA {'.'.join(map(str, driver.cuda))}" if driver else found)


def check_gpu_memory() -> Check:
    """Return how much memory each GPU has free; this imports torch."""
    driver = find_driver()
    if why_no_gpu(driver, torch_build()) or driver is None or not driver.gpus:
        return Check("GPU memory", "ok", "no GPU")
    import torch

    try:
        free = [torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count())]
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:150]
        return Check("GPU memory", "fail", f"torch cannot query the GPU: {reason}", "look at what `nvidia-smi` says")
    told = "; ".join(
        f"{gpu.name}: {left / 1e9:.1f} of {gpu.total_bytes / 1e9:.1f} GB free"
        for gpu, left in zip(driver.gpus, free, strict=False)
    )
    if min(free, default=0) < LOW_GPU_MEMORY:
        return Check("GPU memory", "warn", told, "end the programs that `nvidia-smi` lists, or hide that GPU with "
                     "CUDA_VISIBLE_DEVICES")  # fmt: skip
    return Check("GPU memory", "ok", told)


def check_disk() -> Check:
    """Return whether the data folder can be written and has room."""
    try:
        folder = data_folder()
    except D3POError as error:
        found, _, remedy = str(error).rpartition("; ")
        return Check("disk", "fail", found, remedy)
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    found = f"{folder}: {free / 1e9:.0f} GB free"
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        return Check("disk", "fail", f"{folder} cannot be written", "set D3PO_DATA to another folder")
    if free < LOW_DISK:
        return Check("disk", "warn", found, "free some space, drop old trajectories (`d3po prune`), or set D3PO_DATA")
    return Check("disk", "ok", found)


def check_hub_cache() -> Check:
    """Return whether models can be downloaded to the hub's cache, and its size."""
    cache = hub_cache()
    found = f"{cache.folder}: {cache.bytes / 1e9:.1f} GB of models"
    if not cache.writable:
        return Check("model cache", "fail", f"{cache.folder} cannot be written", "set HF_HOME to another folder")
    if cache.offline:
        return Check("model cache", "warn", f"{found}; HF_HUB_OFFLINE is set", "unset it to download models")
    return Check("model cache", "ok", found)


def check_libraries() -> Check:
    """Return whether the installed libraries are within d3po's own requirements."""
    wrong = []
    for requirement in map(Requirement, _requirements()):
        version = _version(requirement.name)
        if version is None:
            wrong.append((requirement, f"{requirement.name} is not installed"))
        elif not requirement.specifier.contains(version, prereleases=True):
            breaks = BREAKS.get(requirement.name.lower())
            wrong.append((requirement, f"{requirement.name} {version}" + (f" {breaks}" if breaks else "")))
    if not wrong:
        return Check("libraries", "ok", "within the requirements; no pair known to break")
    remedy = "pip install " + " ".join(f"'{requirement.name}{requirement.specifier}'" for requirement, _ in wrong)
    return Check("libraries", "fail", "; ".join(what for _, what in wrong), remedy)


def check_pins() -> Check:
    """Return which installed versions differ from ``constraints.txt``, the set that was tested together."""
    if not CONSTRAINTS.is_file():
        return Check("pins", "ok", "no constraints.txt here to compare with")
    pinned = re.findall(r"^([\w.-]+)==(\S+)", CONSTRAINTS.read_text(), re.M)
    others = [
        f"{name} {found} (tested: {tested})"
        for name, tested in pinned
        if (found := _version(name)) is not None and found.partition("+")[0] != tested
    ]
    if not others:
        return Check("pins", "ok", "installed versions are the tested ones")
    more = f" and {len(others) - NAMED} more" if len(others) > NAMED else ""
    found = ", ".join(others[:NAMED]) + more
    return Check("pins", "warn", found, f"if something breaks: pip install -c {CONSTRAINTS} -e {PROJECT_ROOT}")


def _requirements() -> list[str]:
    try:
        return [text for text in metadata.requires("d3po") or () if "extra ==" not in text]
    except metadata.PackageNotFoundError:
        return []


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


CHECKS: tuple[Callable[[], Check], ...] = (
    check_python, check_torch, check_gpu_memory, check_disk, check_hub_cache, check_libraries, check_pins,
)  # fmt: skip
