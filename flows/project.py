"""The project folder: its deployments, and a new project."""

import os
import shutil
from pathlib import Path
from typing import Any

import yaml

from d3po_core.errors import D3POError
from d3po_core.paths import DEPLOYMENTS, PROJECT_ROOT, project_folder
from d3po_core.store.files import disk_errors

TEMPLATE = PROJECT_ROOT / "d3po" / "project"


def deployments() -> list[dict[str, Any]]:
    """The deployments of the project's prefect.yaml, in file order.

    Raises:
        D3POError: there is no project, or its file cannot be read.
    """
    file = project_folder() / DEPLOYMENTS
    try:
        found = yaml.safe_load(file.read_text())["deployments"]
        said = next(filter(None, map(_wrong_in, found)), "")
    except (OSError, ValueError, RecursionError, yaml.YAMLError, KeyError, TypeError) as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
    if not said:
        return list(found)
    raise D3POError(f"{file} has no deployments that can be read ({said}); mend or restore the file")


def _wrong_in(entry: dict[str, Any]) -> str:
    """What a deployment has of the wrong kind; empty if all is well."""
    if not (isinstance(entry["name"], str) and isinstance(entry["entrypoint"], str)):
        return "a name or an entrypoint is not text"
    parameters = entry.get("parameters") or {}
    mappings = isinstance(parameters, dict) and isinstance(parameters.get("config") or {}, dict)
    return "" if mappings else f"parameters or config of {entry['name']} are not fields with values"


def make_project(folder: Path) -> None:
    """Write a project into a new or empty folder: deployments, prompts, the embedded model, examples.

    Raises:
        D3POError: the folder is not empty or cannot be written.
    """
    with disk_errors(folder / DEPLOYMENTS, "or name another"):
        if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
            raise D3POError(f"{folder} is not empty; name a new or an empty folder: d3po init FOLDER")
        folder.mkdir(parents=True, exist_ok=True)
        try:
            for file in _template_files():
                copy = folder / file.relative_to(TEMPLATE)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)  # without the permissions of an installed package
        except BaseException:
            for entry in folder.iterdir():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            raise


def _template_files() -> list[Path]:
    """Files of a new project; in the clone, some folders are links."""
    found = [
        Path(place, name)
        for place, _, names in os.walk(TEMPLATE, followlinks=True)
        for name in names
        if not name.endswith(".pyc")
    ]
    return sorted(found, key=lambda file: file.name == DEPLOYMENTS)  # last: it makes the folder a project
