"""Read the judgement files of people and other programs into the same text columns.

A file's columns tell its format; docs/judgements.md lists the formats. ``checks`` interprets the cells
and checks them.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from d3po_core.errors import D3POError
from d3po_core.image_ids import MEMBER, SAMPLE
from d3po_core.judgement_files import delimited, label_studio, preference_tables
from d3po_core.judgement_files.delimited import PROBLEMS, Cells, ascii_safe, shown
from d3po_core.judgement_files.image_names import sample_ids
from d3po_core.people.rater_names import composed

# A judgement file's columns, as text; ``said`` is the choice, the rating or the rank.
COLUMNS = ("sample_id", "other_id", "said", "rater", "judged_at", "seconds", "position", "group_id", "prompt",
           "campaign", "campaign_id", "round")  # fmt: skip
OPTIONAL = ("rater", "judged_at", "seconds", "position", "prompt", "campaign", "campaign_id", "round")


@dataclass(frozen=True)
class Format:
    """A table format: its kind of judgement, and our name for each column; the last needed one is ``said``."""

    kind: str
    needed: dict[str, str]
    optional: dict[str, str]


def _format(kind: str, optional: Sequence[str] = (), **needed: str) -> Format:
    return Format(kind, needed, {name: name for name in (*OPTIONAL, *optional)})


FORMATS = {
    "choice": _format("choice", ("group_id",), first_id="sample_id", second_id="other_id", choice="said"),
    "rating": _format("rating", ("group_id",), sample_id="sample_id", rating="said"),
    "rank": _format("rank", group_id="group_id", sample_id="sample_id", rank="said"),
    "Diffusion-KTO": Format(
        "rating", {"file_path": "sample_id", "caption": "prompt", "label": "said"}, {name: name for name in OPTIONAL}
    ),
    "Diffusion-KTO's trainer": Format(
        "rating", {"file_name": "sample_id", "caption": "prompt", "split": "said"}, {name: name for name in OPTIONAL}
    ),
}
_KNOWN = (
    frozenset(name for f in FORMATS.values() for name in (*f.needed, *f.optional))
    | label_studio.OWN
    | frozenset(name for names in preference_tables.WINNERS for name in names)
    | frozenset(preference_tables.PICK_A_PIC)
)


@dataclass(frozen=True)
class Reading:
    """Facts about a file that the user gives because the file lacks them.

    Attributes:
        order: the sample at each position of the published D3PO code's list, one list per group.
        columns: the file's name of each column, by ours: ``{"winner": "better", "loser": "worse"}``.
        control: which control of Label Studio counts.
        left: which column of Label Studio's tasks stood on the left.
        scale: words of an ordered scale of ratings, the worst first.
    """

    order: Sequence[Sequence[str]] | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    control: str | None = None
    left: str | None = None
    scale: Sequence[str] = ()


NOTHING_SAID = Reading()


@dataclass(frozen=True)
class JudgementFile:
    """A file's rows: ``row`` (int64) and ``COLUMNS`` (text, null if empty), not checked yet.

    Attributes:
        name: the file's, for messages.
        format: the recognised format.
        kind: choice, rating or rank.
        noun: what a row is called: row, or item in JSON.
        table: the rows that could be read.
        labels: the file's own name of each column, for messages.
        problems: rows that could not be read: row, column, value, message.
        decimal_comma: whether 1,5 is a number.
        sha256: digest of the file's bytes.
        fingerprint: ``delimited.fingerprint`` of the file when it was read.
        notes: how the file was interpreted, for the report.
    """

    name: str
    format: str
    kind: str
    noun: str
    table: pa.Table
    labels: dict[str, str]
    problems: pa.Table
    decimal_comma: bool = False
    sha256: str = ""
    fingerprint: tuple[int, int, int] = (0, 0, 0)
    notes: tuple[str, ...] = ()


def read_judgement_file(path: Path, reading: Reading = NOTHING_SAID) -> JudgementFile:
    """Recognise a file's format and read its rows as text.

    Args:
        path: CSV (, ; tab or | between cells; UTF-8, UTF-16 or UTF-32), or JSON: records, lines, or lists of numbers.
        reading: facts that the user gives about the file.

    Raises:
        D3POError: the file as a whole cannot be read; the message says why and what to do.
    """
    content, before = delimited.read_bytes(path)
    digest = hashlib.sha256(content).hexdigest()
    text = delimited.utf8(content, path.name)
    del content
    first = text.lstrip()[:1]
    found = _read_json(text, path.name, reading) if first in (b"[", b"{") else _read_table(text, path.name, reading)
    return replace(found, sha256=digest, fingerprint=before)


def _read_table(text: bytes, name: str, reading: Reading) -> JudgementFile:
    cells = delimited.read_cells(text, name, _KNOWN | frozenset(map(delimited.column_name, reading.columns.values())))
    found = _canonical(cells, name, "row", reading)
    return replace(found, decimal_comma=cells.delimiter != ",")


def _read_json(text: bytes, name: str, reading: Reading) -> JudgementFile:
    items = load_json(text, name)
    if isinstance(items, dict):
        hint = " (a sheet's manifest goes to --order)" if "order" in items else ""
        one = _KNOWN | preference_tables.LIST_KEYS | {"annotations", "result"} | set(reading.columns.values())
        items = [items] if one & items.keys() else hint
    if isinstance(items, str) or not items:
        raise D3POError(f"{name}: holds no list of judgements{items or ''}; expected a list of objects or of lists")
    if all(isinstance(item, list) for item in items) or not any(isinstance(item, dict) for item in items):
        return _positional(items, name, reading.order)
    if label_studio.is_raw(items):
        return _label_studio(list(label_studio.of_tasks(items)), PROBLEMS.empty_table(), name, "item", reading)
    chosen = preference_tables.list_format(items)
    if chosen:
        return _lists(items, chosen, name)
    return _canonical(_cells_of(items), name, "item", reading)


def load_json(text: bytes, name: str) -> Any:
    """Parse JSON, or JSON lines as a list.

    Raises:
        D3POError: it is neither; the message says where.
    """
    try:
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            lines = [line for line in text.splitlines() if line.strip()]
            if error.msg != "Extra data" or len(lines) < 2 or not text.lstrip().startswith(b"{"):
                raise
            return [json.loads(line) for line in lines]
    except json.JSONDecodeError as error:
        cut = f"; {delimited.CUT_OFF}" if error.pos >= len(error.doc.rstrip()) or "Unterminated" in error.msg else ""
        raise D3POError(f"{name} line {error.lineno}: is not JSON ({error.msg}){cut or '; correct it there'}") from None
    except (RecursionError, ValueError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:100]
        raise D3POError(f"{name}: cannot be read as JSON ({reason}); expected a list of judgements") from None


def text_of(value: Any) -> str | None:
    """Return a JSON value as a cell's text."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value) if isinstance(value, int | float) else json.dumps(value)


def text_array(values: list[str | None]) -> pa.ChunkedArray:
    """Return text as an Arrow array, with lone surrogates from JSON replaced."""
    try:
        return pa.chunked_array([pa.array(values, pa.string())])
    except UnicodeEncodeError:
        return pa.chunked_array([pa.array([v and ascii_safe(v) for v in values], pa.string())])


def _cells_of(items: list[Any]) -> Cells:
    """Return JSON records as cells; an item that is not an object becomes a problem."""
    names = list(dict.fromkeys(name for item in items if isinstance(item, dict) for name in item))
    bad = [
        {"row": row, "column": "", "value": ascii_safe(text_of(item) or "null"), "message": "is no JSON object"}
        for row, item in enumerate(items, 1)
        if not isinstance(item, dict)
    ]
    rows = np.array([row for row, item in enumerate(items, 1) if isinstance(item, dict)], dtype=np.int64)
    records = [item for item in items if isinstance(item, dict)]
    columns = {ascii_safe(name): text_array([text_of(item.get(name)) for item in records]) for name in names}
    return Cells(columns, rows, pa.Table.from_pylist(bad, schema=PROBLEMS))


def _canonical(cells: Cells, name: str, noun: str, reading: Reading) -> JudgementFile:
    cells = _renamed(cells, name, reading.columns)
    if label_studio.is_export(cells.columns):
        texts = {key: delimited.clean(column).to_pylist() for key, column in cells.columns.items()}
        found = label_studio.of_columns(texts, cells.rows.tolist(), reading.control, reading.scale)
        return _label_studio(list(found), cells.problems, name, noun, reading)
    if pair := preference_tables.winner_columns(set(cells.columns)):
        return _winners(cells, name, noun, pair)
    if set(preference_tables.PICK_A_PIC) <= cells.columns.keys():
        return _pick_a_pic(cells, name, noun)
    chosen = _recognise(set(cells.columns), name)
    wanted = FORMATS[chosen].needed | FORMATS[chosen].optional
    columns = {own: delimited.clean(cells.columns[theirs]) for theirs, own in wanted.items() if theirs in cells.columns}
    labels = {own: theirs for theirs, own in wanted.items() if theirs in cells.columns}
    return _file(name, chosen, FORMATS[chosen].kind, noun, columns, labels, cells)


def _renamed(cells: Cells, name: str, columns: Mapping[str, str]) -> Cells:
    """Rename the columns that the user told us about to our names."""
    found = dict(cells.columns)
    known = _KNOWN - label_studio.OWN
    for ours, said in columns.items():
        theirs = said if said in found else delimited.column_name(said)
        if ours not in known or theirs not in found:
            wrong, listed = (ours, known) if ours not in known else (said, set(cells.columns))
            raise D3POError(
                f"{name}: --columns {ours}={said}: unknown column {shown(wrong)}; known: "
                f"{', '.join(sorted(listed)[:40])}"
            )
        found[ours] = cells.columns[theirs]
        if theirs not in columns:
            found.pop(theirs, None)
    return replace(cells, columns=found)


def _label_studio(
    found: list[label_studio.Annotation | int], problems: pa.Table, name: str, noun: str, reading: Reading
) -> JudgementFile:
    said = label_studio.judgements(
        [one for one in found if not isinstance(one, int)], name, reading.control, reading.left, reading.scale
    )
    wrong = [(one, "is no task with its data and annotations") for one in found if isinstance(one, int)]
    rows, columns = _of_records(said.rows)
    cells = Cells({}, rows, pa.concat_tables([problems, _problems(wrong)]))
    chosen = f"Label Studio {said.kind}"
    return replace(_file(name, chosen, said.kind, noun, columns, said.labels, cells), notes=tuple(said.notes))


def _lists(items: list[Any], chosen: str, name: str) -> JudgementFile:
    found = list(preference_tables.rows_of_lists(items, chosen))
    rows, columns = _of_records([(row, one) for row, one in found if not isinstance(one, str)])
    cells = Cells({}, rows, _problems([(row, one) for row, one in found if isinstance(one, str)]))
    kind = "choice" if "other_id" in columns else "rank"
    if kind == "rank":
        groups = pc.replace_substring_regex(sample_ids(columns["sample_id"]), f"{MEMBER}$", "")
        columns["group_id"] = groups
    return _file(name, chosen, kind, "item", columns, {}, cells)


def _of_records(records: list[tuple[int, dict[str, Any]]]) -> tuple[np.ndarray, dict[str, pa.ChunkedArray]]:
    """Return row numbers and text columns of records that use our column names."""
    names = dict.fromkeys(name for _, record in records for name in record)
    columns = {n: delimited.clean(text_array([text_of(record.get(n)) for _, record in records])) for n in names}
    return np.array([row for row, _ in records], dtype=np.int64), columns


def _problems(found: list[tuple[int, str]]) -> pa.Table:
    listed = [{"row": row, "column": "", "value": "", "message": message} for row, message in found]
    return pa.Table.from_pylist(listed, schema=PROBLEMS)


def _winners(cells: Cells, name: str, noun: str, pair: tuple[str, str]) -> JudgementFile:
    labels = {"sample_id": pair[0], "other_id": pair[1]} | {n: n for n in (*OPTIONAL, "group_id") if n in cells.columns}
    columns = {own: delimited.clean(cells.columns[theirs]) for own, theirs in labels.items()}
    filled = pc.or_(pc.is_valid(columns["sample_id"]), pc.is_valid(columns["other_id"]))
    columns["said"] = pc.if_else(filled, pa.scalar("first"), pa.scalar(None, pa.string()))
    return _file(name, f"{pair[0]} and {pair[1]}", "choice", noun, columns, labels | {"said": pair[0]}, cells)


def _pick_a_pic(cells: Cells, name: str, noun: str) -> JudgementFile:
    others = {own: theirs for theirs, own in preference_tables.PICK_A_PIC_OTHERS.items() if theirs in cells.columns}
    others |= {own: own for own in ("rater", "campaign", "campaign_id") if own in cells.columns}
    labels = {"sample_id": "image_0_uid", "other_id": "image_1_uid"} | others
    columns = {own: delimited.clean(cells.columns[theirs]) for own, theirs in labels.items()}
    columns["said"] = text_array(preference_tables.pick_a_pic_choices(cells.columns))
    return _file(name, "Pick-a-Pic", "choice", noun, columns, labels | {"said": "label_0 and label_1"}, cells)


def _recognise(found: set[str], name: str) -> str:
    whole = [f for f, expected in FORMATS.items() if expected.needed.keys() <= found]
    if len(whole) == 1:
        return whole[0]
    have = ", ".join(shown(column, 40) for column in sorted(found)[:20])
    if whole:
        raise D3POError(f"{name}: columns {have} fit {' and '.join(whole)}; keep the columns of one format")
    near = max(FORMATS, key=lambda f: (list(FORMATS[f].needed)[-1] in found, len(FORMATS[f].needed.keys() & found)))
    needed = FORMATS[near].needed
    if needed.keys() & found:
        missing = ", ".join(column for column in needed if column not in found)
        raise D3POError(
            f"{name}: missing column {missing} of format {near} ({', '.join(needed)}); the header has {have}"
        )
    expected = "; ".join(f"{f}: {', '.join(FORMATS[f].needed)}" for f in FORMATS)
    raise D3POError(
        f"{name}: no known format; the header has {have}; expected {expected}; winner, loser; Pick-a-Pic's; or Label "
        "Studio's export; say which column is which: --columns winner=...,loser=..."
    )


def _file(
    name: str, chosen: str, kind: str, noun: str, columns: dict[str, pa.ChunkedArray], labels: dict[str, str],
    cells: Cells,
) -> JudgementFile:  # fmt: skip
    empty = pa.nulls(len(cells.rows), pa.string())
    if "rater" in columns:  # the same name typed on another system is the same rater
        names = columns["rater"].unique()
        same = pa.array([name and composed(name) for name in names.to_pylist()], pa.string())
        columns["rater"] = same.take(pc.index_in(columns["rater"], names))
    columns |= {own: sample_ids(columns[own]) for own in ("sample_id", "other_id") if own in columns}
    table = pa.table({"row": pa.array(cells.rows, pa.int64())} | {c: columns.get(c, empty) for c in COLUMNS})
    return JudgementFile(name, chosen, kind, noun, table, labels, cells.problems)


def _positional(items: list[Any], name: str, order: Sequence[Sequence[str]] | None) -> JudgementFile:
    """Read the published code's list: one list per prompt, one number per image, higher is better.

    Source: ``load_data_from_json`` in scripts/utils.py of github.com/yk7333/D3PO.
    """
    if order is None:
        raise D3POError(
            f"{name}: is a list without ids; say which image each position is: --order manifest.json of the sheet, "
            "or --order sampled"
        )
    groups = items if all(isinstance(item, list) for item in items) else [items]
    expected = order if groups is items else [[sample for group in order for sample in group]]
    lengths, wanted = [len(group) for group in groups], [len(group) for group in expected]
    if lengths != wanted:
        at = next((i for i, (a, b) in enumerate(zip(lengths, wanted, strict=False)) if a != b), None)
        where = f"list {at + 1} has {lengths[at]} numbers, the order {wanted[at]}" if at is not None else ""
        raise D3POError(
            f"{name}: has {len(lengths)} lists, the order {len(wanted)}; {where or 'expected as many'}; "
            "give the order of this file"
        )
    samples = [sample for group in expected for sample in group]
    said = text_array([text_of(value) for group in groups for value in group])
    columns = {"sample_id": text_array(list(samples)), "said": delimited.clean(said)}
    rows = np.arange(1, len(samples) + 1)
    cells = Cells({}, rows, PROBLEMS.empty_table())
    labels = {"sample_id": "sample", "said": "number"}
    return _file(name, "D3PO positional list", "rating", "position", columns, labels, cells)


def load_order(path: Path) -> list[list[str]]:
    """Return a positional list's samples, from a sheet's manifest or a JSON list of sample ids per group.

    Raises:
        D3POError: the file holds something else.
    """
    found = load_json(delimited.utf8(delimited.read_bytes(path)[0], path.name), path.name)
    order = found.get("order") if isinstance(found, dict) else found
    groups: list[Any] = order if isinstance(order, list) else []
    ids = [sample for group in groups if isinstance(group, list) for sample in group]
    if not ids or not all(isinstance(i, str) and re.fullmatch(SAMPLE, i) for i in ids):
        raise D3POError(f"{path.name}: is no order; expected lists of sample ids, such as [['r3-g0-m0', 'r3-g0-m1']]")
    return [group if isinstance(group, list) else [] for group in groups]
