"""Files that come on first need: readers ask here before they open files, which matters for mirrored campaigns alone.

A campaign on disk has no source: nothing happens. ``d3po_core.mirror.reading`` gives a source to the folder in which
it lays out a mirrored campaign. The process knows its sources; nothing on disk does.
"""

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Protocol


class Source(Protocol):
    """Where a folder's files come from."""

    shown: str

    @property
    def lacking(self) -> int:
        """Return how many files were asked for that the source does not have."""

    def bring(self, names: Iterable[str]) -> None:
        """Bring files by their paths in the campaign; ignore unknown ones and those that the source lacks."""

    def tables(self, tables: Collection[str], rounds: Collection[int] | None) -> list[str]:
        """Return the names of tables' files, of the given rounds or of all."""

    def lacks(self, names: Iterable[str]) -> int:
        """Return how many of these files the source knows but does not have."""


_sources: dict[Path, Source] = {}


def serve(campaign: Path, source: Source) -> None:
    """Bring the files of a folder from a source from now on."""
    _sources[campaign] = source


def source_of(campaign: Path) -> Source | None:
    """Return where a campaign's files come from; None if they are on disk."""
    return _sources.get(campaign)


def bring_tables(campaign: Path, tables: Collection[str], rounds: Collection[int] | None = None) -> None:
    """Bring tables' files, of the given rounds or of all.

    Raises:
        D3POError: the source does not answer, or a file there is gone or damaged.
    """
    if source := source_of(campaign):
        source.bring(source.tables(tables, rounds))


def bring(campaign: Path, names: Iterable[str]) -> None:
    """Bring files by their paths in the campaign.

    Raises:
        D3POError: the source does not answer, or a file there is gone or damaged.
    """
    if source := source_of(campaign):
        source.bring(names)


def bring_paths(paths: Iterable[Path]) -> int:
    """Bring images or other files of any campaigns; return how many of them their sources do not have.

    Raises:
        D3POError: a source does not answer, or a file there is gone or damaged.
    """
    wanted, lacking = list(paths) if _sources else [], 0
    for campaign, source in _sources.items():
        names = [path.relative_to(campaign).as_posix() for path in wanted if path.is_relative_to(campaign)]
        source.bring(names)
        lacking += source.lacks(names)
    return lacking
