"""Read tables of published data sets a few rows at a time: Parquet, CSV, JSON and JSON lines, or a folder of them."""

import contextlib
import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from d3po_core.datasets.layouts import OPTIONAL, Layout, layout_of
from d3po_core.errors import D3POError

TABLES = (".parquet", ".jsonl", ".ndjson", ".csv", ".json")


@dataclass(frozen=True)
class Source:
    """A table of a data set; its images are in it, or beside it.

    Attributes:
        path: the file.
        layout: what its columns mean.
        columns: its columns under our names.
        renamed: the file's names by ours, where they differ.
    """

    path: Path
    layout: Layout
    columns: tuple[str, ...]
    renamed: dict[str, str]

    def chunks(self, size: int, finished: Callable[[int], bool]) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """Yield the number of its first row, from 0, and up to ``size`` rows, until the end.

        Args:
            size: rows at once; no more are read into memory, except of a .json, which is read whole.
            finished: tells whether the chunk from a row on is not needed; not all of those are left out.
        """
        parts = _parquet if self.path.suffix == ".parquet" else _texts
        with _readable(self.path):
            for first, rows in parts(self.path, size, self._needed(), finished):
                if not finished(first):
                    for row in rows:
                        row |= {name: row.pop(theirs) for name, theirs in self.renamed.items() if theirs in row}
                    yield first, rows

    def _needed(self) -> list[str]:
        ours = [*(self.layout.found(self.columns) or ()), *OPTIONAL]
        return [self.renamed.get(name, name) for name in ours if name in self.columns]


def find_sources(paths: Iterable[Path], layout: str | None, renamed: dict[str, str]) -> list[Source]:
    """Return the tables of a data set, in order.

    Args:
        paths: files and folders. Of a folder, the tables in it count, else those below; and of these the first kind of
            ``TABLES`` that there is.
        layout: the layout's name; recognised by the columns if None.
        renamed: the files' column names by ours.

    Raises:
        D3POError: a path is gone, a folder has no table, a file cannot be read, or no layout fits its columns.
    """
    sources = []
    for path in (file for given in paths for file in _files(given)):
        ours = {theirs: name for name, theirs in renamed.items()}
        columns = tuple(ours.get(name, name) for name in _columns(path))
        sources.append(Source(path, layout_of(columns, path.name, layout), columns, renamed))
    return sources


def _files(path: Path) -> list[Path]:
    if path.is_file() and path.suffix in TABLES:
        return [path]
    for search in (path.glob, path.rglob) if path.is_dir() else ():
        for suffix in TABLES:
            if found := sorted(search(f"*{suffix}")):
                return found
    what = "holds no such file" if path.is_dir() else "is none" if path.exists() else "does not exist"
    raise D3POError(f"{path}: {what}; expected a table ({', '.join(TABLES)}), or a folder with tables beside images")


def _columns(path: Path) -> list[str]:
    with _readable(path):
        if path.suffix == ".parquet":
            return list(pq.read_schema(path).names)
        first = next(_rows(path), None)
    if first is None:
        raise D3POError(f"{path}: has no rows; expected one per pair, ranking or image")
    return list(first)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn errors of reading a table into one line."""
    try:
        yield
    except (OSError, ValueError, csv.Error, pa.ArrowException) as error:
        if isinstance(error, D3POError):
            raise
        raise D3POError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]}); is the file whole?") from None


def _parquet(
    path: Path, size: int, columns: list[str], finished: Callable[[int], bool]
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """Yield rows of a Parquet file; of a row group whose chunks are all finished, nothing is read."""
    with pq.ParquetFile(path) as file:
        first = 0
        for group in range(file.num_row_groups):
            count = file.metadata.row_group(group).num_rows
            if not all(finished(first + start) for start in range(0, count, size)):
                start = first
                for batch in file.iter_batches(size, row_groups=[group], columns=columns):
                    yield start, batch.to_pylist()
                    start += len(batch)
            first += count


def _texts(
    path: Path, size: int, columns: list[str], finished: Callable[[int], bool]
) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    rows, first = _rows(path), 0
    while chunk := list(islice(rows, size)):
        yield first, chunk
        first += len(chunk)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        if path.suffix == ".csv":
            yield from _csv_rows(stream)
        elif path.suffix == ".json":
            yield from map(_record, json.load(stream))
        else:
            yield from (_record(line) for line in stream if line.strip())


def _csv_rows(stream: TextIO) -> Iterator[dict[str, Any]]:
    """Yield rows whose fields may have any length; other readers of this process keep their limit."""
    reader = csv.DictReader(stream)
    while True:
        before = csv.field_size_limit(sys.maxsize)
        try:
            row = next(reader, None)
        finally:
            csv.field_size_limit(before)
        if row is None:
            return
        yield row


def _record(item: Any) -> dict[str, Any]:
    """Return a record, empty if it is none: the import then reports its row."""
    with contextlib.suppress(ValueError):
        item = json.loads(item) if isinstance(item, str) else item
    return item if isinstance(item, dict) else {}
