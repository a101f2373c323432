"""Parts shared by the commands: --campaign, printing tables and paths, writing files, a loading message."""

import contextlib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from d3po.flows.commands import completing
from d3po_core.errors import D3POError

CampaignOption = Annotated[
    str,
    typer.Option(help="Name of the campaign, or its folder if that is elsewhere", autocompletion=completing.campaigns),
]
ReadCampaignOption = Annotated[
    str,
    typer.Option(
        "--campaign",
        help="Name of the campaign, its folder if that is elsewhere, or the address of its mirror",
        autocompletion=completing.campaigns,
    ),
]
# What is to run.
DeploymentArgument = Annotated[
    str,
    typer.Argument(help="Name of a deployment in prefect.yaml, such as round", autocompletion=completing.deployments),
]
RoundsOption = Annotated[int, typer.Option(min=1, help="Number of rounds to add")]
NameOption = Annotated[
    str | None,
    typer.Option(
        "--campaign", help="Name of the campaign; the deployment's by default", autocompletion=completing.campaigns
    ),
]
ConfigOption = Annotated[
    Path | None, typer.Option("--config", help="YAML file of fields; it overrides the deployment, and --set the file")
]
SettingOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="Set a field: train.learning_rate=1e-3; may be repeated", autocompletion=completing.settings
    ),
]


def console(stream: Any = None) -> Console:
    """A console as wide as its terminal, or wide enough for tables if there is none; shows cells unchanged."""
    stream = stream or sys.stdout
    width = None if stream.isatty() else 240
    # Brackets and colons in prompts and names are neither markup nor emoji.
    return Console(file=stream, width=width, highlight=False, markup=False, emoji=False)


def print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], stream: Any = None) -> None:
    """Print rows as a table, or one below the other if the terminal is too narrow; null is an empty cell."""
    from rich.measure import Measurement
    from rich.table import Table

    cells = [["" if value is None else shown(_rounded(value)) for value in row] for row in rows]
    table, target = Table(*map(shown, columns)), console(stream)
    for row in cells:
        table.add_row(*row)
    if Measurement.get(target, target.options.update(max_width=10_000), table).minimum <= target.width:
        target.print(table)
        return
    width = max(len(shown(column)) for column in columns)
    for row in cells:
        lines = (f"{shown(column):{width}}  {cell}" for column, cell in zip(columns, row, strict=True))
        target.print("\n".join(lines) + "\n", soft_wrap=True)


def _rounded(value: Any) -> Any:
    """A value for a reader: numbers with the digits that matter, times to the second."""
    if isinstance(value, float):
        return f"{value:.4f}" if 1e-3 <= abs(value) < 1e6 else f"{value:.4g}"
    if isinstance(value, datetime):
        return value.replace(microsecond=0)
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_rounded(inner)}" for key, inner in value.items())
    return value


def shown(value: Any) -> str:
    """A value as text for a terminal, with control characters escaped."""
    from d3po_core.queries.query import plain

    return plain(str(value))


def outside_campaigns(output: Path | None) -> None:
    """Refuse an output path inside a campaign's folder.

    Raises:
        D3POError: the path is inside one.
    """
    from d3po_core.paths import HERE, absolute
    from d3po_core.store.campaign import CAMPAIGN_FILE

    for folder in absolute(str(output), HERE, "--output").parents if output else ():
        if (folder / CAMPAIGN_FILE).exists():
            raise D3POError(f"--output {output}: lies in the campaign's own folder; name a file or folder elsewhere")


@contextlib.contextmanager
def writing(output: Path | None) -> Iterator[Any]:
    """A text stream to a file, written whole or not at all; without a file, to standard output.

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
    """Show a message while something slow is imported, and hide the libraries' own messages."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    with Console(stderr=True).status(f"loading {what}"):
        yield
