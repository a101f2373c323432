"""What travels between the run's machine and its workers: a configuration, files in both directions, a model.

Everything is JSON or bytes. Files are numpy arrays of bytes, which Ray's object store hands out without a copy.
"""

import importlib.metadata
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from d3po_core.config import CampaignConfig
from d3po_core.paths import resolve_path
from d3po_core.processes.job import Files
from d3po_core.store.files import atomic_path, disk_errors
from d3po_core.store.images import at_once
from d3po_core.store.integrity import require_files, sha256_of

VERSIONS = ("d3po", "torch", "diffusers")
INPUTS = "inputs"
MODEL_FIELDS = ("path", "single_file_config", "start_from")


def bytes_of(path: Path) -> np.ndarray:
    """Return a file's bytes."""
    return np.fromfile(path, np.uint8)


def without_copies(files: Files) -> Files:
    """Return files' contents as arrays, which Ray hands over without a copy, unlike bytes."""
    return {path: np.frombuffer(content, np.uint8) for path, content in files.items()}


def files_below(folder: Path, paths: Iterable[str]) -> list[str]:
    """Return the files at these paths, where a folder stands for all its files; those that are not there are left out.

    Temporary files do not count.
    """
    found = []
    for path in paths:
        within = [folder / path] if (folder / path).is_file() else sorted((folder / path).rglob("*"))
        found += [f.relative_to(folder).as_posix() for f in within if f.is_file() and not f.name.endswith(".tmp")]
    return found


def pack(config: CampaignConfig, needs: list[str], inputs: tuple[str, ...]) -> dict[str, Path]:
    """Return the files that a worker gets, by their path in the worker's folder.

    Raises:
        D3POError: a file of the campaign is gone or damaged.
    """
    listed = files_below(config.folder, needs)
    require_files(config.folder, listed)
    parcel = {path: config.folder / path for path in listed}
    for name in inputs:
        place = resolve_path(_value(config, name))
        parcel[f"{INPUTS}/{name}{place.suffix}"] = place
    return parcel


def unpack(folder: Path, files: Files) -> None:
    """Write files into a folder that is emptied before."""
    shutil.rmtree(folder, ignore_errors=True)
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        with disk_errors(folder / path):
            (folder / path).write_bytes(content)


def keep_files(config: CampaignConfig, round_number: int, files: Files) -> None:
    """Write files into the campaign, each whole or not at all, the last after all others: it makes them count."""

    def keep(path: str) -> None:
        with atomic_path(config.folder / path) as temporary:
            temporary.write_bytes(files[path])

    paths = list(files)
    at_once(keep, paths[:-1])
    at_once(keep, paths[-1:])


def letter(config: CampaignConfig) -> str:
    """Return the configuration for a worker, whose relative paths may start elsewhere."""
    values = config.model_dump(mode="json")
    for name, place in model_places(config).items():
        values["model"][name] = str(place)
    return json.dumps({"config": values, "sha256": config.sha256()})


def read_letter(text: str, folder: Path, shipped: dict[str, str]) -> CampaignConfig:
    """Return the configuration on a worker: its campaign lies in ``folder``, with the inputs that came along.

    Args:
        text: from ``letter``.
        folder: the worker's folder.
        shipped: where models that were sent lie, by their place on the run's machine.
    """
    content = json.loads(text)
    values = content["config"]
    for name in MODEL_FIELDS:
        values["model"][name] = shipped.get(values["model"][name], values["model"][name])
    for path in (folder / INPUTS).glob("*"):
        section, name = path.name.split(".")[:2]
        values[section][name] = str(path)
    return CampaignConfig.model_validate(values).on_worker(folder, content["sha256"])


def model_places(config: CampaignConfig) -> dict[str, Path]:
    """Return the settings of the model that name something on this machine, with its absolute path."""
    places = {name: getattr(config.model, name) for name in MODEL_FIELDS}
    found = {name: resolve_path(place) for name, place in places.items() if place}
    return {name: place for name, place in found.items() if place.exists()}


def digests(place: Path) -> dict[str, str]:
    """Return the SHA-256 of a folder's files, or of one file, by path; hidden files do not count."""
    files = [place] if place.is_file() else [p for p in sorted(place.rglob("*")) if p.is_file()]
    root = place.parent if place.is_file() else place
    shown = {p.relative_to(root).as_posix(): p for p in files}
    return {name: sha256_of(path) for name, path in shown.items() if not name.startswith(".") and "/." not in name}


def versions() -> dict[str, Any]:
    """Return the installed versions of the packages that must be the same on all nodes."""
    found = {}
    for name in VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def _value(config: CampaignConfig, name: str) -> Any:
    section, _, field = name.partition(".")
    return getattr(getattr(config, section), field)
