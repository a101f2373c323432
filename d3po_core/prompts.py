"""Prompts: read from a file, and drawn for a round."""

import csv
from collections.abc import Sequence
from pathlib import Path

from d3po_core.config import resolve_path
from d3po_core.errors import D3POError
from d3po_core.seeds import derive_seed, permutation


def load_prompts(path: str, column: str, field: str) -> list[str]:
    """Distinct prompts of a file, in its order.

    Args:
        path: a text file (one prompt a line), a CSV or a Parquet file.
        column: the column to read of a CSV or Parquet file.
        field: name of the configuration field, for messages.

    Raises:
        D3POError: no such file, no such column, not text, or no prompt in it.
    """
    file = resolve_path(path)
    if not file.is_file():
        raise D3POError(
            f"{field} {path!r}: no such file ({file}); give a text file with one prompt a line, CSV or Parquet"
        )
    readers = {".csv": _read_csv, ".parquet": _read_parquet}
    try:
        found = readers.get(file.suffix.lower(), _read_text)(file, column, field)
    except (UnicodeDecodeError, OSError, csv.Error) as error:
        raise D3POError(f"{field} {path!r}: cannot be read ({error}); expected UTF-8 text, CSV or Parquet") from None
    prompts = list(dict.fromkeys(p.strip() for p in found if p and p.strip()))
    if not prompts:
        raise D3POError(f"{field} {path!r}: holds no prompt; expected at least one")
    return prompts


def _read_text(file: Path, column: str, field: str) -> list[str]:
    return file.read_text(encoding="utf-8-sig").splitlines()


def _read_csv(file: Path, column: str, field: str) -> list[str]:
    with file.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream)
        _require_column(column, reader.fieldnames or (), file, field)
        return [row[column] or "" for row in reader]


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
    """Make sure that no evaluation prompt is trained on.

    Raises:
        D3POError: a prompt is in both lists.
    """
    both = sorted(set(training) & set(held_out))
    if both:
        raise D3POError(
            f"{len(both)} prompts are in sample.prompts and in evaluate.prompts ({both[0]!r} first); "
            "take them out of one, or the held-out score says nothing"
        )


def draw_prompts(prompts: list[str], count: int, seed: int, round_number: int) -> list[tuple[str, int]]:
    """Prompts of a round's groups, each with how often it came before in this round.

    Every prompt is used once before one is used twice; the order is new each round.
    """
    drawn: list[tuple[str, int]] = []
    occurrence = 0
    while len(drawn) < count:
        order = permutation(derive_seed(seed, round_number, "prompts", occurrence), len(prompts))
        drawn += [(prompts[i], occurrence) for i in order]
        occurrence += 1
    return drawn[:count]
