"""Read Label Studio's exports (raw JSON, storage files, JSON-MIN and CSV) as judgements of one kind.

Shapes follow its converter (label-studio-sdk, converter/converter.py and converter/exports/csv2.py): raw JSON keeps
each result's ``type`` and ``from_name``; JSON-MIN and CSV have one column per control, without the type.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from d3po_core.errors import D3POError
from d3po_core.judgement_files.delimited import shown
from d3po_core.judgement_files.image_names import names_sample, sample_id_of
from d3po_core.judgement_files.words import BAD, CHOICES, GOOD, SKIPS

# Columns that Label Studio adds to an export; the others hold the task's data and the controls.
OWN = frozenset({"annotator", "annotation_id", "created_at", "updated_at", "lead_time", "id", "agreement", "history"})
# For each judging type, the key that holds a result's value.
TYPES = {"pairwise": "selected", "rating": "rating", "ranker": "ranker", "choices": "choices"}
_WORDS = frozenset((*CHOICES, *GOOD, *BAD, *SKIPS))
_OF_TASK = ("prompt", "group_id", "position", "campaign", "round")
_ENDS = (("left", "right"), ("first", "second"), ("a", "b"), ("A", "B"), ("0", "1"), ("1", "2"))


@dataclass(frozen=True)
class Result:
    """One control's result: its name, type and value, and the image's tag (empty if unknown)."""

    control: str
    type: str
    value: Any
    image: str = ""


@dataclass(frozen=True)
class Annotation:
    """One person's results on a task; ``judged`` is false if nobody annotated the task."""

    row: int
    data: dict[str, Any]
    judged: bool = False
    results: Sequence[Result] = ()
    own: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Judgements:
    """Numbered rows of one kind, the file's column names, and notes on the interpretation."""

    kind: str
    rows: list[tuple[int, dict[str, Any]]]
    labels: dict[str, str]
    notes: list[str]


def is_export(columns: dict[str, Any]) -> bool:
    """Return whether the columns are those of a CSV or JSON-MIN export."""
    return {"annotator", "annotation_id"} <= columns.keys()


def is_raw(items: list[Any]) -> bool:
    """Return whether a JSON list holds tasks with annotations, or annotations with their task (target storage)."""
    return any(
        isinstance(item, dict) and (isinstance(item.get("annotations"), list) or _stored(item)) for item in items
    )


def _stored(item: dict[str, Any]) -> bool:
    return isinstance(item.get("result"), list) and isinstance(item.get("task"), dict)


def of_tasks(tasks: list[Any]) -> Iterator[Annotation | int]:
    """Yield the annotations of raw tasks; for an item that is not a task, yield only its row number."""
    row = 0
    for task in tasks:
        if isinstance(task, dict) and _stored(task):
            task = {"data": task["task"].get("data"), "annotations": [task]}
        data = task.get("data") if isinstance(task, dict) else None
        annotations = task.get("annotations") if isinstance(task, dict) else None
        if not isinstance(data, dict) or not isinstance(annotations, list):
            row += 1
            yield row
            continue
        for annotation in annotations or [{}]:
            row += 1
            yield _annotation(row, data, annotation) if annotation != {} else Annotation(row, data)


def _annotation(row: int, data: dict[str, Any], annotation: Any) -> Annotation | int:
    results = annotation.get("result") if isinstance(annotation, dict) else None
    if not isinstance(results, list) or not all(isinstance(result, dict) for result in results):
        return row
    rater = annotation.get("completed_by")
    if isinstance(rater, dict):
        rater = rater.get("email") or rater.get("id")
    found = []
    for result in [] if annotation.get("was_cancelled") else results:
        value = result.get("value")
        key = next((key for key in TYPES.values() if isinstance(value, dict) and key in value), None)
        kind = next((kind for kind, name in TYPES.items() if name == key), str(result.get("type")))
        said = value[key] if key is not None and isinstance(value, dict) else value
        found.append(Result(str(result.get("from_name")), kind, said, str(result.get("to_name") or "")))
    times = annotation.get("updated_at") or annotation.get("created_at")
    own = {"rater": rater, "judged_at": times, "seconds": annotation.get("lead_time")}
    return Annotation(row, data, True, found, own)


def of_columns(
    columns: dict[str, list[str | None]], rows: Sequence[int], control: str | None, scale: Sequence[str]
) -> list[Annotation]:
    """Return the annotations of a CSV or JSON-MIN export; each column is a control or task data."""
    parsed = {key: [_parsed(cell) for cell in cells] for key, cells in columns.items() if key not in OWN}
    types = {key: kind for key, cells in parsed.items() if (kind := _type(key, cells, control, scale))}
    found = []
    for index, row in enumerate(rows):
        cell = {key: cells[index] for key, cells in columns.items()}
        data = {key: cells[index] for key, cells in parsed.items() if key not in types}
        results = [
            Result(key, kind, _value(parsed[key][index], kind))
            for key, kind in types.items()
            if parsed[key][index] is not None
        ]
        own = {"rater": cell["annotator"], "judged_at": cell.get("updated_at") or cell.get("created_at"),
               "seconds": cell.get("lead_time")}  # fmt: skip
        found.append(Annotation(row, data, bool(cell["annotation_id"]), results, own))
    return found


def _parsed(cell: str | None) -> Any:
    text = (cell or "").strip()
    if not text.startswith(("[", "{")):
        return text or None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _type(key: str, cells: list[Any], control: str | None, scale: Sequence[str]) -> str | None:
    """Return the type of a column's control, or None if the column holds task data."""
    for cell in cells:
        first = cell[0] if isinstance(cell, list) and cell else cell
        if isinstance(first, dict):
            return next((kind for kind, name in TYPES.items() if name in first), "text" if "text" in first else None)
    words = {cell.strip().lower() for cell in cells if isinstance(cell, str)}
    known = _WORDS | {word.strip().lower() for word in scale}
    return "choices" if words and (key == control or (len(words) <= len(known) and words <= known)) else None


def _value(cell: Any, kind: str) -> Any:
    first = cell[0] if isinstance(cell, list) and len(cell) == 1 else cell
    return first.get(TYPES.get(kind, kind), first) if isinstance(first, dict) else first


def judgements(
    annotations: list[Annotation], name: str, control: str | None, left: str | None, scale: Sequence[str]
) -> Judgements:
    """Return the judgements of one control, or one rating per image.

    Args:
        annotations: people's annotations.
        name: the file's, for messages.
        control: the control that counts, if several judge.
        left: the data column whose image stood on the left.
        scale: words of an ordered scale of ratings.

    Raises:
        D3POError: no control judges, several do, or the images cannot be identified.
    """
    if not any(annotation.judged for annotation in annotations):
        raise D3POError(f"{name}: its tasks have no annotations; label and submit some, then export again")
    chosen, kind = _chosen(annotations, name, control, scale)
    if kind == "rank":
        return _ranks(annotations, chosen)
    wanted = ["first_id", "second_id"] if kind == "choice" else ["sample_id"]
    images = _image_columns(annotations)
    columns = wanted if all(any(key in a.data for a in annotations) for key in wanted) else images
    per_image = kind == "rating" and len(columns) > 1
    if len(columns) != len(wanted) and not (per_image and len(chosen) > 0):
        what = ", ".join(map(shown, columns)) or "none"
        raise D3POError(
            f"{name}: columns that name images of a campaign: {what}; expected {len(wanted)}, with files named as in "
            f"the campaign (r3-g12-m5.png), or columns {', '.join(wanted)} in the tasks"
        )
    if per_image:
        return _ratings(annotations, chosen, columns, name)
    notes = []
    if kind == "choice":
        columns = columns if columns is wanted else _from_left(columns, name, left)
        notes = [f"left is column {shown(columns[0])}, right is {shown(columns[1])}"]
    names = dict(zip(("sample_id", "other_id"), columns, strict=False))
    rows = [
        (a.row, {own: a.data.get(theirs) for own, theirs in names.items()} | _rest(a, _said(a, chosen)))
        for a in annotations
    ]
    return Judgements(kind, rows, names | {"said": chosen[0]}, notes)


def _rest(annotation: Annotation, said: Any) -> dict[str, Any]:
    of_task = {key: annotation.data[key] for key in _OF_TASK if key in annotation.data}
    return of_task | annotation.own | {"said": said if annotation.judged else None}


def _said(annotation: Annotation, chosen: list[str]) -> Any:
    """Return the control's value; an annotation without a result counts as skipped."""
    values = [result.value for result in annotation.results if result.control in chosen]
    value = values[0] if len(values) == 1 else values or "skip"
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _chosen(
    annotations: list[Annotation], name: str, control: str | None, scale: Sequence[str]
) -> tuple[list[str], str]:
    """Return the controls that count, and the kind of their judgements."""
    types = {result.control: result.type for a in annotations for result in a.results}
    judging = [key for key, kind in types.items() if kind in TYPES and control in (None, key)]
    if not judging or (len(judging) > 1 and {types[key] for key in judging} != {"rating"}):
        held = "; ".join(
            f"{shown(key)} ({types[key]}: {_sample(annotations, key)})" for key in sorted(judging or types)
        )
        data = ", ".join(sorted({shown(str(key)) for a in annotations for key in a.data}))
        do = "say which one counts: --control NAME" if judging else "name the one that judges: --control NAME"
        raise D3POError(
            f"{name}: found {held or 'no column'} as controls that judge; expected one; {do} "
            f"(columns of the tasks: {data})"
        )
    kind = {"pairwise": "choice", "rating": "rating", "ranker": "rank"}.get(types[judging[0]])
    return judging, kind or _kind_of_words(annotations, judging, scale)


def _sample(annotations: list[Annotation], control: str) -> str:
    values = {str(r.value) for a in annotations for r in a.results if r.control == control}
    return ", ".join(shown(value, 30) for value in sorted(values)[:3])


def _kind_of_words(annotations: list[Annotation], chosen: list[str], scale: Sequence[str]) -> str:
    said = {str(_said(a, chosen)).strip().lower() for a in annotations if a.judged} - set(SKIPS)
    pairs = len(_image_columns(annotations)) == 2 or any("first_id" in a.data for a in annotations)
    return "choice" if not scale and said <= CHOICES.keys() and pairs else "rating"


def _image_columns(annotations: list[Annotation]) -> list[str]:
    return sorted({key for a in annotations for key, value in a.data.items() if names_sample(value)})


def _end(text: str) -> str:
    """Return the ending that tells similar names apart: digits or a side."""
    return next((end for ends in _ENDS for end in ends if text.endswith(end) and len(end) > 1), text[-1:])


def _ratings(annotations: list[Annotation], chosen: list[str], columns: list[str], name: str) -> Judgements:
    """Return one rating per image of a task; a control's tag tells which image column it rates."""
    tags = sorted({r.image or r.control for a in annotations for r in a.results if r.control in chosen})
    of_tag: dict[str, str] = {}
    for tag in tags:
        same = [column for column in columns if column == tag] or [c for c in columns if _end(c) == _end(tag)]
        if len(same) != 1 or same[0] in of_tag.values():
            raise D3POError(
                f"{name}: which of the columns {', '.join(map(shown, columns))} the ratings at {shown(tag)} are "
                "of cannot be told; name the image tags in the labelling interface as the columns are named"
            )
        of_tag[tag] = same[0]
    rows = []
    for a in annotations:
        said = {of_tag[r.image or r.control]: r.value for r in a.results if r.control in chosen}
        rows += [(a.row, {"sample_id": a.data.get(c)} | _rest(a, said.get(c, "skip"))) for c in of_tag.values()]
    notes = [f"ratings at {shown(tag)} are of column {shown(column)}" for tag, column in of_tag.items()]
    return Judgements("rating", rows, {"said": chosen[0]}, notes)


def _ranks(annotations: list[Annotation], chosen: list[str]) -> Judgements:
    """Return the ranks in a ranker or its only bucket, best first; ids lead to a list's images."""
    rows: list[tuple[int, dict[str, Any]]] = []
    for a in annotations:
        images = {
            str(item["id"]): next((v for v in item.values() if names_sample(v)), None)
            for items in a.data.values() if isinstance(items, list)
            for item in items if isinstance(item, dict) and "id" in item
        }  # fmt: skip
        order = next((r.value for r in a.results if r.control in chosen), None)
        if isinstance(order, dict):
            order = next(iter(order.values()), None) if len(order) == 1 else json.dumps(order)
        if order is None:
            ranked: list[tuple[str, Any]] = [(item, "skip") for item in images]
        else:
            listed = order if isinstance(order, list) else [order]
            ranked = [(str(item), place) for place, item in enumerate(listed, 1)]
        for item, place in ranked:
            image = images.get(item) or item
            group = (sample_id_of(image) or "").rpartition("-")[0] or None
            rows.append((a.row, {"group_id": group, "sample_id": image} | _rest(a, place)))
    return Judgements("rank", rows, {"said": chosen[0]}, ["the first of a ranker's list is the best"])


def _from_left(found: list[str], name: str, left: str | None) -> list[str]:
    """Sort two columns by their place on the screen, given by ``left`` or their names.

    Raises:
        D3POError: neither gives an order; a wrong guess would reverse every preference.
    """
    if left is not None:
        if left not in found:
            raise D3POError(f"{name}: --left {shown(left)}: the columns with images are {', '.join(map(shown, found))}")
        return [left, *(column for column in found if column != left)]
    for first, second in (found, found[::-1]):
        for early, late in _ENDS:
            if first.endswith(early) and second == first.removesuffix(early) + late:
                return [first, second]
    raise D3POError(
        f"{name}: which of the columns {shown(found[0])} and {shown(found[1])} stood on the left cannot be told from "
        "their names; say it: --left COLUMN"
    )
