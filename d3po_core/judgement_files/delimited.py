"""Read other programs' files as text cells: encodings, delimiters, quotes, ragged rows, truncated files."""

import csv
import io
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from d3po_core.errors import D3POError
from d3po_core.spreadsheets import FORMULA_START

MAX_BYTES = 1 << 30
BLOCK_BYTES = 16 << 20  # also the longest record allowed
PROBLEMS = pa.schema([("row", pa.int64()), ("column", pa.string()), ("value", pa.string()), ("message", pa.string())])

_BINARY = {
    b"PK\x03\x04": "an Excel workbook or a zip archive; save the sheet as CSV UTF-8",
    b"\xd0\xcf\x11\xe0": "an old Excel workbook; save the sheet as CSV UTF-8",
    b"PAR1": "Parquet; export it as CSV",
    b"\x1f\x8b": "compressed; unpack it",
    b"%PDF": "a PDF; export a CSV",
    b"\x89PNG": "an image",
}
CUT_OFF = "is the file still being written? Import it again when it is whole"


@dataclass(frozen=True)
class Cells:
    """Text cells by column name, each row's number (as in a spreadsheet: the header is 1), and unreadable rows."""

    columns: dict[str, pa.ChunkedArray]
    rows: np.ndarray
    problems: pa.Table
    delimiter: str = ","


def clean(cells: pa.ChunkedArray) -> pa.ChunkedArray:
    """Undo ``neutralise``, strip white space, make empty cells null."""
    if pc.any(pc.starts_with(cells, "'")).as_py():
        cells = pc.replace_substring_regex(cells, f"^'('*[{FORMULA_START}])", r"\1")
    if pc.any(pc.starts_with(cells, '="')).as_py():  # spreadsheets write text this way
        cells = pc.replace_substring_regex(cells, r'^="(.*)"$', r"\1")
    cells = pc.utf8_trim_whitespace(cells)
    return pc.if_else(pc.equal(cells, ""), pa.scalar(None, pa.string()), cells)


def fingerprint(path: Path) -> tuple[int, int, int]:
    """Size, time of the last change and inode; if they change, somebody has written the file."""
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ino


def read_bytes(path: Path) -> tuple[bytes, tuple[int, int, int]]:
    """The content of a file that nobody is writing, and its fingerprint.

    Raises:
        D3POError: no such file, not a plain file, unreadable, empty, too large, or changed while it was read.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise D3POError(f"{path}: is no plain file; import the files in it one by one")
        before = fingerprint(path)
        if before[0] > MAX_BYTES:
            raise D3POError(f"{path}: has {before[0]:,} bytes; expected at most {MAX_BYTES:,}; split it")
        content = path.read_bytes()
        changed = fingerprint(path) != before or len(content) != before[0]
    except (OSError, ValueError) as error:
        if isinstance(error, D3POError):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise D3POError(f"{os.fspath(path)!r}: cannot be read ({reason}); check its name and rights") from None
    if changed:
        raise D3POError(f"{path.name}: changed while it was read; {CUT_OFF}")
    if not content.strip(b"\0 \t\r\n"):
        raise D3POError(f"{path.name}: is empty; expected a header and a row for each judgement")
    return content, before


def utf8(content: bytes, name: str) -> bytes:
    """Convert to UTF-8 without a byte order mark; recognise UTF-16 and UTF-32 by theirs, UTF-16 also by its zeros.

    Raises:
        D3POError: another encoding, or another program's binary file.
    """
    for magic, what in _BINARY.items():
        if content.startswith(magic):
            raise D3POError(f"{name}: is {what}; expected CSV or JSON text")
    encoding = "utf-8-sig"
    if content[:4] in (b"\xff\xfe\0\0", b"\0\0\xfe\xff"):
        encoding = "utf-32"
    elif content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        encoding = "utf-16"
    else:
        zeros = {index % 2 for index, byte in enumerate(content[:64]) if not byte}
        if len(zeros) == 1 and content[:64].count(0) > len(content[:64]) // 3:
            encoding = "utf-16-le" if 1 in zeros else "utf-16-be"
    try:
        text = content.decode(encoding)
    except UnicodeDecodeError as error:
        line = len(re.findall(rb"\r\n|\r|\n", content[: error.start])) + 1
        raise D3POError(
            f"{name} line {line}: byte {content[error.start]:#04x} is not {encoding.removesuffix('-sig').upper()}; "
            "save the file as 'CSV UTF-8'"
        ) from None
    if encoding == "utf-8-sig":
        return content.removeprefix(b"\xef\xbb\xbf")
    return text.removeprefix("\ufeff").encode("utf-8", "replace")


def read_cells(content: bytes, name: str, known: frozenset[str]) -> Cells:
    """Read delimited text as cells.

    Args:
        content: UTF-8.
        name: the file's, for messages.
        known: column names that help to recognise the delimiter.

    Raises:
        D3POError: no header, a column twice, an open quote, or a record longer than ``BLOCK_BYTES``.
    """
    start = re.match(rb'(?:[ \t]*(?:\r\n|\r|\n)|"?sep=.?"?(?:\r\n|\r|\n))*', content)
    assert start is not None
    skipped = len(re.findall(rb"\r\n|\r|\n", start[0]))
    content = content[start.end() :]
    title = _title(content, known)
    skipped += len(re.findall(rb"\r\n|\r|\n", content[:title]))
    content = content[title:]
    delimiter, header = _header(content, name, known)
    ragged: list[tuple[int | None, int, str]] = []

    def keep(row: pyarrow.csv.InvalidRow) -> str:
        ragged.append((row.number, row.actual_columns, row.text))
        return "skip"

    names = [f"c{index}" for index in range(len(header))]
    try:
        table = pyarrow.csv.read_csv(
            pa.BufferReader(content),
            pyarrow.csv.ReadOptions(use_threads=False, block_size=BLOCK_BYTES, column_names=names),
            pyarrow.csv.ParseOptions(
                delimiter=delimiter, newlines_in_values=True, ignore_empty_lines=False, invalid_row_handler=keep
            ),
            pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False),
        )
    except pa.ArrowInvalid as error:
        raise D3POError(
            f"{name}: cannot be read as a table ({' '.join(str(error).split())[:200]}); is a quote left open?"
        ) from None
    lost = np.array([number for number, *_ in ragged if number], dtype=np.int64)
    rows = np.delete(np.arange(1, len(table) + len(lost) + 1), lost - 1) + skipped
    _check_end(content, name, table, ragged)
    problems = [
        {"row": number + skipped, "column": "", "value": text, "message": _ragged(count, len(header))}
        for number, count, text in ragged
        if number
    ]
    columns = {label: table[index].slice(1) for index, label in enumerate(header)}
    return Cells(columns, rows[1:], pa.Table.from_pylist(problems, schema=PROBLEMS), delimiter)


def _ragged(count: int, expected: int) -> str:
    return f"has {count} cells; expected {expected} as in the header (quote cells that hold the delimiter)"


def column_name(text: str) -> str:
    """Normalize a header's column name: lower case, with underscores."""
    return re.sub(r"[\s-]+", "_", text.strip().lower())


def _title(content: bytes, known: frozenset[str]) -> int:
    """Bytes of the lines above the header, such as a sheet's title or ``Table 1``; 0 if there are none."""
    lines = re.findall(rb"[^\r\n]*(?:\r\n|\r|\n)", content[: 1 << 16])[:4]
    counts = [
        max(len(known & {column_name(cell.strip('"')) for cell in text.split(delimiter)}) for delimiter in ",;\t|")
        for text in (line.decode("utf-8", "ignore") for line in lines)
    ]
    header = next((index for index, count in enumerate(counts) if count >= 2), 0)
    return sum(map(len, lines[:header])) if not any(counts[:header]) else 0


def _header(content: bytes, name: str, known: frozenset[str]) -> tuple[str, list[str]]:
    """The delimiter that finds most known columns, and the normalized column names."""
    text = content[: 1 << 16].decode("utf-8", "ignore")
    found: list[tuple[int, int, str, list[str]]] = []
    for delimiter in ",;\t|":
        try:
            cells = next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), [])
        except csv.Error:
            continue
        names = [column_name(cell) for cell in cells]
        found.append((len(known & set(names)), len(names), delimiter, names))
    if not found:
        raise D3POError(f"{name}: the first line is no header; expected column names")
    _, _, delimiter, names = max(found, key=lambda candidate: candidate[:2])
    twice = sorted({label for label in names if label and names.count(label) > 1})
    if twice:
        raise D3POError(f"{name}: the header has {', '.join(map(shown, twice))} more than once; keep one")
    return delimiter, [label or f"column {index + 1}" for index, label in enumerate(names)]


def _check_end(content: bytes, name: str, table: pa.Table, ragged: list[tuple[int | None, int, str]]) -> None:
    """Refuse a file that ends in the middle of a record."""
    last = len(table) + len(ragged)
    whole = content.endswith((b"\n", b"\r"))
    ends_ragged = bool(ragged) and ragged[-1][0] == last
    tail = [ragged[-1][2]] if ends_ragged else [column[-1].as_py() for column in table.columns] if len(table) else []
    open_quote = content.count(b'"') % 2 == 1 and (not whole or any(re.search(r"[\r\n]", cell) for cell in tail))
    if open_quote:
        raise D3POError(f"{name} row {last}: a quote is opened and never closed; close it, or {CUT_OFF}")
    if ends_ragged and not whole:
        raise D3POError(f"{name} row {last}: is cut off ({shown(ragged[-1][2])}); {CUT_OFF}")


def shown(value: str | None, limit: int = 60) -> str:
    """A user's text for a message: quoted, on one line, shortened, without terminal control characters."""
    if value is None:
        return "(empty)"
    return ascii_safe(repr(value if len(value) <= limit else value[:limit] + "..."))


def ascii_safe(text: str) -> str:
    """Replace lone surrogates, which no file can hold."""
    return text.encode("utf-8", "replace").decode()
