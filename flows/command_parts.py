"""What the commands share: --campaign, how tables and paths are shown, files to write, a word while something loads."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

CampaignOption = Annotated[str, typer.Option(help="Name of the campaign, or its folder when it lies elsewhere")]


def console(stream: Any = None) -> Console:
    """A console as wide as its terminal; where there is none, wide enough for tables. Cells are shown as they are."""
    stream = stream or sys.stdout
    width = None if stream.isatty() else 240
    # A prompt or a name with square brackets or colons is neither markup nor an emoji.
    return Console(file=stream, width=width, highlight=False, markup=False, emoji=False)


@contextlib.contextmanager
def writing(output: Path | None) -> Iterator[Any]:
    """A text stream to the file, which is there whole or not at all; without one, to standard output.

    Raises:
        D3POError: the file cannot be written.
    """
    if output is None:
        yield sys.stdout
        return
    from d3po_core.tables import atomic_path

    with atomic_path(output, "or name another --output") as temporary, temporary.open("w", encoding="utf-8") as stream:
        yield stream


@contextlib.contextmanager
def loading(what: str = "torch and diffusers") -> Iterator[None]:
    """Say that something slow is being imported, and nothing else."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    with Console(stderr=True).status(f"loading {what}"):
        yield


def short(path: Path) -> str:
    """A path as it is typed from here, the whole one when it lies elsewhere."""
    return os.path.relpath(path) if path.resolve().is_relative_to(Path.cwd()) else str(path)
