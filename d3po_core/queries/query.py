"""Query a campaign with one reading statement, on a connection that can do nothing else."""

import contextlib
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import duckdb
import pyarrow as pa

from d3po_core.errors import D3POError
from d3po_core.queries.views import connect_views
from d3po_core.spreadsheets import FORMULA_START
from d3po_core.store.at_hand import source_of

# DuckDB may not download or load extensions, read secrets or write files beside an answer; a query cannot undo this.
LOCKED = (
    "SET autoinstall_known_extensions = false", "SET autoload_known_extensions = false",
    "SET allow_community_extensions = false", "SET allow_persistent_secrets = false", "SET temp_directory = ''",
    "SET lock_configuration = true",
)  # fmt: skip
# In JSON text: a whole string, or a number that JSON does not allow.
_STRING_OR_NO_NUMBER = re.compile(r'"(?:[^"\\]|\\.)*"|-?\bInfinity\b|-?\bNaN\b')
# Characters that a terminal obeys instead of showing: control characters, and those that change the text direction.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")


@contextlib.contextmanager
def ask(campaign: Path, sql: str, on_page: pa.Table | None = None) -> Iterator[duckdb.DuckDBPyRelation]:
    """Yield the rows of a SELECT over a campaign's tables and views; it may also read files that it names.

    Args:
        campaign: the campaign's folder.
        sql: the statement.
        on_page: see ``connect_views``.

    Raises:
        D3POError: it is not a SELECT, is more than one statement, or cannot be answered.
    """
    try:
        fetched = source_of(campaign) is not None  # then fetch only the tables that the statement names
        with connect_views(campaign, on_page, sql if fetched else None) as connection:
            for setting in LOCKED:
                connection.execute(setting)
            statements = connection.extract_statements(sql)
            kinds = [statement.type for statement in statements]
            if kinds != [duckdb.StatementType.SELECT]:
                found = " and ".join(kind.name for kind in kinds) or "nothing"
                raise D3POError(
                    f"query: found {found}; expected one SELECT, which only reads (--output FILE writes the answer)"
                )
            yield connection.sql(sql)
    except duckdb.Error as error:
        raise D3POError(f"query: {' '.join(str(error).split())}") from None


def write_answer(answer: duckdb.DuckDBPyRelation, format: str, path: Path) -> None:
    """Write an answer as ``csv``, ``json`` (one object per line) or ``parquet``; numbers stay unchanged.

    In CSV, text that a spreadsheet would run as a formula gets a leading apostrophe, and a byte order mark tells
    spreadsheets that the file is UTF-8. In JSON, NaN and infinity become null.
    """
    if format == "csv":
        answer = answer.project(
            ", ".join(_as_text(*column) for column in zip(answer.columns, answer.types, strict=True))
        )
    options = "FORMAT csv, HEADER" if format == "csv" else f"FORMAT {format}"
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "answer"
        answer.query("answer", f"COPY answer TO '{made}' ({options})")
        if format == "json":
            _without_nan(made)
        with path.open("wb") as output, made.open("rb") as source:
            output.write(b"\xef\xbb\xbf" if format == "csv" else b"")
            shutil.copyfileobj(source, output)


def print_answer(answer: duckdb.DuckDBPyRelation, format: str) -> None:
    """Print an answer as ``csv`` or ``json``; on a terminal, escape control characters."""
    stream = sys.stdout
    with tempfile.TemporaryDirectory() as folder:
        write_answer(answer, format, Path(folder) / "answer")
        with (Path(folder) / "answer").open(encoding="utf-8-sig", newline="") as source:
            for line in source:
                stream.write(plain(line.rstrip("\r\n")) + "\n" if stream.isatty() else line)


def plain(text: str) -> str:
    r"""Return text with the characters that a terminal obeys written out, such as ``\x1b``."""
    return _OBEYED.sub(lambda match: repr(match[0])[1:-1], text)


def _as_text(name: str, kind: object) -> str:
    quoted = '"' + name.replace('"', '""') + '"'
    if str(kind) != "VARCHAR":
        return quoted
    return f"regexp_replace({quoted}, '^(''*[{FORMULA_START}])', '''\\1') AS {quoted}"


def _without_nan(path: Path) -> None:
    lines = path.with_name("lines")
    with path.open(encoding="utf-8") as source, lines.open("w", encoding="utf-8") as output:
        for line in source:
            output.write(_STRING_OR_NO_NUMBER.sub(lambda match: match[0] if match[0][0] == '"' else "null", line))
    lines.replace(path)
