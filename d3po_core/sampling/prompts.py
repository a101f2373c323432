"""Read prompts from a file and draw them for a round."""

import csv
import io
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from d3po_core.errors import D3POError
from d3po_core.paths import resolve_path


def load_prompts(path: str, column: str, field: str) -> list[str]:
    """Return a file's distinct prompts, in order.

    Args:
        path: a text file (one prompt per line), CSV, TSV, JSON (a list), JSON lines or Parquet.
        column: the table column, or the field of JSON objects, to read.
        field: name of the configuration field, for messages.

    Raises:
        D3POError: the file or column is missing, holds no text, or holds no prompt.
    """
    file = resolve_path(path)
    if not file.is_file():
        raise D3POError(
            f"{field} {path!r}: no such file ({file}); give text with one prompt per line, CSV, TSV, JSON or Parquet"
        )
    readers = {
        ".csv": _read_csv, ".tsv": _read_csv, ".parquet": _read_parquet, ".json": _read_json, ".jsonl": _read_json,
        ".ndjson": _read_json,
    }  # fmt: skip
    try:
        found = readers.get(file.suffix.lower(), _read_text)(file, column, field)
    except (UnicodeDecodeError, OSError, csv.Error, json.JSONDecodeError, RecursionError) as error:
        raise D3POError(
            f"{field} {path!r}: cannot be read ({error}); expected text in UTF-8 or UTF-16, CSV, TSV, JSON or Parquet"
        ) from None
    prompts = list(dict.fromkeys(p.strip() for p in found if p and p.strip()))
    if not prompts:
        raise D3POError(f"{field} {path!r}: holds no prompt; expected at least one")
    return prompts


def _text_of(file: Path) -> str:
    """Return a file's text: UTF-8, or UTF-16 if it starts with a byte order mark."""
    data = file.read_bytes()
    return data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")


def _read_text(file: Path, column: str, field: str) -> list[str]:
    text = _text_of(file)
    if text.lstrip()[:1] in ("{", "["):
        raise D3POError(
            f"{field} {file}: looks like JSON, not like one prompt per line; name it .json (a list) or .jsonl (an "
            "object per line)"
        )
    return re.split(r"\r\n|\r|\n", text)  # unlike splitlines, keep U+2028 and the like: a prompt may hold them


def _read_json(file: Path, column: str, field: str) -> list[str]:
    """Read a list of prompts, or of objects with field ``column``; .json holds one list, .jsonl one entry per line."""
    text = _text_of(file)
    found = (
        json.loads(text) if file.suffix.lower() == ".json" else [json.loads(x) for x in text.splitlines() if x.strip()]
    )
    if not isinstance(found, list):
        raise D3POError(f"{field} {file}: holds a {type(found).__name__}; expected a list of prompts or of objects")
    prompts = []
    for number, entry in enumerate(found, 1):
        prompt = entry.get(column) if isinstance(entry, dict) else entry
        if not isinstance(prompt, str):
            raise D3POError(
                f"{field} {file}: entry {number} has no text as {column!r}; expected a string, or an object with such "
                "a field"
            )
        prompts.append(prompt)
    return prompts


def _read_csv(file: Path, column: str, field: str) -> list[str]:
    """Read a table's column; .tsv uses tabs, else the header decides between tab, semicolon and comma."""
    text = _text_of(file)
    header = text.partition("\n")[0]
    delimiter = max("\t;,", key=header.count) if file.suffix.lower() != ".tsv" else "\t"
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    _require_column(column, reader.fieldnames or (), file, field)
    prompts = []
    for row in reader:
        if None in row:  # more cells than the header has
            raise D3POError(
                f"{field} {file} line {reader.line_num}: has more cells than the header; put prompts with "
                f"{delimiter!r} in them between quotes"
            )
        prompts.append(row[column] or "")
    return prompts


def _read_parquet(file: Path, column: str, field: str) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        _require_column(column, pq.read_schema(file).names, file, field)
        values = pq.read_table(file, columns=[column]).column(0)
        if pa.types.is_dictionary(values.type):
            values = values.cast(values.type.value_type)
    except pa.ArrowInvalid as error:
        raise D3POError(f"{field} {file}: is not a Parquet file ({error})") from None
    if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
        raise D3POError(f"{field} {file}: column {column!r} holds {values.type}; expected strings")
    return [value or "" for value in values.to_pylist()]


def _require_column(column: str, names: Sequence[str], file: Path, field: str) -> None:
    if column not in names:
        raise D3POError(f"{field} {file}: has no column {column!r}; its columns are {', '.join(names) or 'none'}")


def check_held_out(training: list[str], held_out: list[str]) -> None:
    """Check that no evaluation prompt is trained on.

    Raises:
        D3POError: a prompt is in both lists, ignoring case and spaces.
    """
    if both := sorted(prompts_among(set(held_out), training)):
        raise D3POError(
            f"{len(both)} prompts are in sample.prompts and in evaluate.prompts ({both[0]!r} first); "
            "take them out of one, or the held-out score says nothing"
        )


def prompts_among(prompts: Iterable[str], others: Iterable[str]) -> list[str]:
    """Return the prompts that are also among the others, ignoring case and spaces."""
    known = {_plain(prompt) for prompt in others}
    return [prompt for prompt in prompts if _plain(prompt) in known]


def _plain(prompt: str) -> str:
    return " ".join(prompt.casefold().split())


def draw_prompts(prompts: list[str], count: int, seed: int, round_number: int) -> list[tuple[str, int]]:
    """Return the prompts of a round's groups, each with its number of earlier uses in this round.

    Every prompt comes once before any comes twice. Each round has a new order.
    """
    from d3po_core.seeds import derive_seed, permutation  # imports torch, which reading prompts does not need

    drawn: list[tuple[str, int]] = []
    occurrence = 0
    while len(drawn) < count:
        order = permutation(derive_seed(seed, round_number, "prompts", occurrence), len(prompts))
        drawn += [(prompts[i], occurrence) for i in order]
        occurrence += 1
    return drawn[:count]
