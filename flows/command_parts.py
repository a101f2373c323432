"""What the commands share: the option --campaign, how tables and paths are shown, and a word while something loads."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

CampaignOption = Annotated[str, typer.Option(help="Name of the campaign")]


def console(stream: Any = None) -> Console:
    """A console as wide as its terminal; where there is none, wide enough for tables."""
    stream = stream or sys.stdout
    return Console(file=stream, width=None if stream.isatty() else 240, highlight=False)


@contextlib.contextmanager
def loading(what: str = "torch and diffusers") -> Iterator[None]:
    """Say that something slow is being imported, and nothing else."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    with Console(stderr=True).status(f"loading {what}"):
        yield


def short(path: Path) -> str:
    """A path as it is typed from here, the whole one when it lies elsewhere."""
    return os.path.relpath(path) if path.resolve().is_relative_to(Path.cwd()) else str(path)
