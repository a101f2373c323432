"""Folders that leave the house: whole or not at all, with a card in front, and no path of this machine in it."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from d3po_core.config import CampaignConfig, is_url, resolve_path
from d3po_core.errors import D3POError
from d3po_core.tables import as_readable_as_usual, disk_errors
from d3po_core.urls import masked


@contextlib.contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A temporary folder beside ``output`` that becomes it when the block ends well, and vanishes when it does not.

    Raises:
        D3POError: ``output`` is there and not empty, or is a file; or the disk is full or cannot be written.
    """
    output = output.resolve()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        what = "is not empty" if output.is_dir() else "is a file"
        raise D3POError(f"--output {output}: {what}; nothing is overwritten, name a new folder")
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    with disk_errors(output):
        try:
            temporary.mkdir(parents=True)
            yield temporary
            for path in temporary.rglob("*"):
                if path.is_file():
                    as_readable_as_usual(path)
            os.replace(temporary, output)  # an empty folder may be replaced
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def card(header: dict[str, Any], body: str) -> str:
    """A README in Markdown with a YAML header, as the Hugging Face hub reads it."""
    return f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---\n\n{body.strip()}\n"


def public_config(config: CampaignConfig) -> dict[str, Any]:
    """A configuration to show to others: of paths outside the project only the last part, and no ``runs_dir``."""
    values = config.model_dump(mode="json", exclude={"runs_dir"})
    places = [("model", "path"), ("model", "single_file_config"), ("sample", "prompts"), ("evaluate", "prompts")]
    for holder, key in [
        *((values[section], field) for section, field in places),
        *((values["scoring"]["models"], name) for name in values["scoring"]["models"]),
    ]:
        if is_url(holder[key] or ""):
            holder[key] = masked(holder[key])
        path = Path(holder[key] or "")
        if path.is_absolute() or str(path).startswith(("~", "..")):
            holder[key] = path.name
    return values


def hub_model(config: CampaignConfig) -> str | None:
    """The base model's hub id, None when the base model is a folder."""
    return None if resolve_path(config.model.path).exists() else config.model.path
