"""What the commands share: --campaign, how tables and paths are shown, files to write, a word while something loads."""

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from d3po_core.errors import D3POError

CampaignOption = Annotated[str, typer.Option(help="Name of the campaign, or its folder when it lies elsewhere")]


def console(stream: Any = None) -> Console:
    """A console as wide as its terminal; where there is none, wide enough for tables. Cells are shown as they are."""
    stream = stream or sys.stdout
    width = None if stream.isatty() else 240
    # A prompt or a name with square brackets or colons is neither markup nor an emoji.
    return Console(file=stream, width=width, highlight=False, markup=False, emoji=False)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], stream: Any = None) -> None:
    """Print rows; a cell shows whatever it holds, and nothing for null."""
    from rich.table import Table

    table = Table(*map(shown, columns))
    for row in rows:
        table.add_row(*("" if value is None else shown(value) for value in row))
    console(stream).print(table)


def shown(value: Any) -> str:
    """A value as text that a terminal shows and does not obey."""
    from d3po_core.queries.query import plain

    return plain(str(value))


def outside_campaigns(output: Path | None) -> None:
    """Make sure that a file or folder to write is not in a campaign's own folder.

    Raises:
        D3POError: it is.
    """
    from d3po_core.config import absolute
    from d3po_core.store.campaign import CAMPAIGN_FILE

    for folder in absolute(str(output), Path.cwd(), "--output").parents if output else ():
        if (folder / CAMPAIGN_FILE).exists():
            raise D3POError(f"--output {output}: lies in the campaign's own folder; name a file or folder elsewhere")


@contextlib.contextmanager
def writing(output: Path | None) -> Iterator[Any]:
    """A text stream to the file, which is there whole or not at all; without one, to standard output.

    Raises:
        D3POError: the file cannot be written.
    """
    if output is None:
        yield sys.stdout
        return
    from d3po_core.store.files import atomic_path

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
