"""Label Studio's exports: raw JSON, JSON-MIN and CSV of its pairwise and rating templates.

Shapes as its converter writes them (label-studio-sdk, converter/converter.py and converter/exports/csv2.py): a task's
data become columns, so does each control, whose cell is a list of results without their type, or one choice's text.
"""

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from d3po_core.delimited import clean, shown
from d3po_core.errors import D3POError

SAMPLE_ID = r"r[0-9]+-g[0-9]+-m[0-9]+"
# Columns of every export; the others are the task's data and the controls.
OWN = frozenset({"annotator", "annotation_id", "created_at", "updated_at", "lead_time", "id", "agreement", "history"})
_ONE = r'^\[?\s*\{{[^{{}}\[\]]*"{key}"\s*:\s*\[?\s*"?(?P<said>[^"{{}}\[\],]*)"?\s*\]?[^{{}}\[\]]*\}}\s*\]?$'
_WORDS = {
    "choice": {"left", "right", "first", "second", "tie", "equal", "skip"},
    "rating": {"good", "bad", "yes", "no"},
}


def is_export(columns: dict[str, Any]) -> bool:
    """Whether the columns are those of a CSV or JSON-MIN export."""
    return {"annotator", "annotation_id"} <= columns.keys()


def is_raw(items: list[Any]) -> bool:
    """Whether a JSON list holds tasks with their annotations."""
    return any(isinstance(item, dict) and isinstance(item.get("annotations"), list) for item in items)


def flatten(tasks: list[Any], name: str) -> list[Any]:
    """Tasks as the records of JSON-MIN: one an annotation; cancelled ones have no result."""
    records: list[Any] = []
    for task in tasks:
        annotations = task.get("annotations") if isinstance(task, dict) else None
        if not isinstance(annotations, list) or not isinstance(task.get("data"), dict):
            records.append(None)
            continue
        records += [_record(task["data"], annotation) for annotation in annotations]
    if not records:
        raise D3POError(f"{name}: its tasks have no annotations; label and submit some, then export again")
    return records


def _record(data: dict[str, Any], annotation: Any) -> dict[str, Any] | None:
    results = annotation.get("result") if isinstance(annotation, dict) else None
    if not isinstance(results, list) or not all(isinstance(result, dict) for result in results):
        return None
    rater = annotation.get("completed_by")
    if isinstance(rater, dict):
        rater = rater.get("email") or rater.get("id")
    outputs: dict[str, list[Any]] = {}
    for result in [] if annotation.get("was_cancelled") else results:
        outputs.setdefault(str(result.get("from_name")), []).append(result.get("value"))
    record: dict[str, Any] = {f"_data_{key}" if key in outputs else str(key): value for key, value in data.items()}
    own = {key: annotation.get(key) for key in ("created_at", "updated_at", "lead_time")}
    return record | outputs | own | {"annotator": rater, "annotation_id": annotation.get("id")}


def sample_ids(cells: pa.ChunkedArray) -> pa.ChunkedArray:
    """The sample that a path, address or id names by its last part; the cell itself where it names none."""
    found = pc.struct_field(pc.extract_regex(cells, rf"(?:^|[^A-Za-z0-9])(?P<id>{SAMPLE_ID})(?:\.[A-Za-z]+)?$"), "id")
    return pc.coalesce(found, cells)


def read(columns: dict[str, pa.ChunkedArray], name: str) -> tuple[str, dict[str, pa.ChunkedArray], dict[str, str]]:
    """Kind of judgement, canonical columns, and their names in the file.

    Raises:
        D3POError: not exactly one control, or not the images that it needs.
    """
    cleaned = {key: clean(column) for key, column in columns.items()}
    controls = {key: found for key, column in cleaned.items() if key not in OWN and (found := _control(column))}
    if len(controls) != 1:
        what = ", ".join(shown(key) for key in sorted(controls)) or "none"
        raise D3POError(f"{name}: found {what} as columns of ratings or choices; expected one; keep one of them")
    control, kind = next(iter(controls.items()))
    images = _images(cleaned, control, kind, name)
    cells = cleaned[control]
    for key in ("selected", "rating", "choices"):
        said = pc.struct_field(pc.extract_regex(cells, _ONE.format(key=key)), "said")
        cells = pc.coalesce(said, cells)
    result = {own: sample_ids(cleaned[theirs]) for own, theirs in images.items()}
    said = pc.fill_null(cells, "skip")  # an annotation without a result is one that was skipped
    if "annotation_id" in cleaned:  # a task without an annotation was judged by nobody: it says nothing
        said = pc.if_else(pc.is_valid(cleaned["annotation_id"]), said, pa.scalar(None, pa.string()))
    result["said"] = said
    labels = images | {"said": control}
    times = [cleaned[key] for key in ("updated_at", "created_at") if key in cleaned]
    if times:
        result["judged_at"], labels["judged_at"] = pc.coalesce(*times), "updated_at"
    own_names = {"rater": "annotator", "seconds": "lead_time"}
    own_names |= {key: key for key in ("prompt", "group_id", "position", "campaign", "round")}
    for own, theirs in own_names.items():
        if theirs in cleaned and theirs != control:
            result[own], labels[own] = cleaned[theirs], theirs
    return kind, result, labels


def _control(cells: pa.ChunkedArray) -> str | None:
    """The kind of judgement that a column holds, if any."""
    for key, kind in (("selected", "choice"), ("rating", "rating")):
        if pc.any(pc.match_substring_regex(cells, rf'^\[?\s*\{{.*"{key}"\s*:')).as_py():
            return kind
    words = {str(value).lower() for value in pc.unique(pc.drop_null(cells)).to_pylist()[:50]}
    for kind, known in _WORDS.items():
        if words and words <= known:
            return kind
    return None


def _images(columns: dict[str, pa.ChunkedArray], control: str, kind: str, name: str) -> dict[str, str]:
    """Which columns name the judged images; of two, the left one first, if their names tell which that is."""
    wanted = ["sample_id", "other_id"] if kind == "choice" else ["sample_id"]
    explicit = ["first_id", "second_id"] if kind == "choice" else ["sample_id"]
    if set(explicit) <= columns.keys():
        return dict(zip(wanted, explicit, strict=True))
    pattern = rf"(?:^|[^A-Za-z0-9]){SAMPLE_ID}(?:\.[A-Za-z]+)?$"
    found = sorted(
        key for key, cells in columns.items()
        if key != control and key not in OWN and pc.any(pc.match_substring_regex(cells, pattern)).as_py()
    )  # fmt: skip
    if len(found) != len(wanted):
        what = ", ".join(shown(key) for key in found) or "none"
        raise D3POError(
            f"{name}: columns that name images of a campaign: {what}; expected {len(wanted)}, with files named as in "
            f"the campaign (r3-g12-m5.png), or columns {', '.join(explicit)} in the tasks"
        )
    return dict(zip(wanted, _from_left(found, name) if kind == "choice" else found, strict=True))


def _from_left(found: list[str], name: str) -> list[str]:
    """Two columns in the order in which they stand on the screen, as their names tell it: image1, image2; left, right.

    Raises:
        D3POError: their names tell no order; a guess would turn every preference round.
    """
    for first, second in (found, found[::-1]):
        for early, late in (("left", "right"), ("first", "second"), ("a", "b"), ("A", "B"), ("0", "1"), ("1", "2")):
            if first.endswith(early) and second == first.removesuffix(early) + late:
                return [first, second]
    raise D3POError(
        f"{name}: which of the columns {shown(found[0])} and {shown(found[1])} stood on the left cannot be told from "
        "their names; rename them in the file to image1 (left) and image2 (right)"
    )
