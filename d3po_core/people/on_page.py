"""The labelling page's answers that no table holds yet, as a table for SQL."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from d3po_core.people.journal import JOURNAL_FILE, Entry, unexported_entries
from d3po_core.queries.query import ask
from d3po_core.queries.views import ON_PAGE


@contextlib.contextmanager
def ask_with_page(campaign: Path, sql: str) -> Iterator[duckdb.DuckDBPyRelation]:
    """Yield the rows of ``query.ask``, with the page's answers in the view ``page_judgements``.

    Raises:
        D3POError: the query cannot be answered, or it names that view and the journal cannot be read.
    """
    page = on_page(campaign) if "page_judgements" in sql.casefold() else None
    with ask(campaign, sql, page) as answer:
        yield answer


def on_page(campaign: Path) -> pa.Table:
    """Answers and skips of the page's journal that are not in ``judgements`` yet, by ``views.ON_PAGE``.

    It changes nothing and may be called while the page writes.

    Raises:
        D3POError: the journal cannot be read.
    """
    rows: list[dict[str, Any]] = []
    if (campaign / JOURNAL_FILE).exists():
        for number, entries in unexported_entries(campaign).items():
            taken_back = {entry.undoes for entry in entries}
            rows += [_row(number, entry, entry.seq in taken_back) for entry in entries if entry.action != "undo"]
    return pa.Table.from_pylist(rows, schema=ON_PAGE)


def _row(round_number: int, entry: Entry, taken_back: bool) -> dict[str, Any]:
    return {
        "round": round_number, "rater": entry.rater, "mode": entry.mode, "group_id": entry.question_id.split(":")[1],
        "sample_ids": list(entry.shown), "answer": None if entry.answer is None else list(entry.answer),
        "skipped": entry.action == "skip", "taken_back": taken_back, "seconds": entry.seconds,
        "judged_at": entry.judged_at,
    }  # fmt: skip
