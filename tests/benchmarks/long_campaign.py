"""Make a campaign long in seconds: copy one of its really run rounds, with new ids, records and digests.

Images, trajectories and weights are hard links, so a thousand rounds take little of the disk. MLflow's local store gets
the copies' runs, models and versions too, as if every round had been delivered.
"""

import contextlib
import hashlib
import json
import os
import re
import sqlite3
import uuid
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from d3po_core.store.tables import SCHEMAS

LINKED = ("images", "trajectories", "checkpoints", "report")
Rename = Callable[[str], str]


def renamer(source: int, number: int) -> Rename:
    """Return a function that turns a text about round ``source`` into one about round ``number``."""
    named = {f"round={source}": f"round={number}", f"round={source - 1}": f"round={number - 1}"}
    pattern = re.compile(rf"round=({source}|{source - 1})(?!\d)|\br{source}-")
    return lambda text: pattern.sub(lambda found: named.get(found[0], f"r{number}-"), text)


def copy_round(campaign: Path, source: int, number: int) -> None:
    """Write round ``number`` as a copy of round ``source``; both follow a finished round."""
    rename, digests = renamer(source, number), {}
    for folder in LINKED:
        kept = campaign / folder / f"round={source}.json"  # of the report; other folders have one per round
        for file in [kept] if kept.exists() else sorted((campaign / folder / f"round={source}").iterdir()):
            target = campaign / rename(file.relative_to(campaign).as_posix())
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(file, target)
    for table in SCHEMAS:
        for file in (campaign / table / f"round={source}").glob("*.parquet"):
            _copy_table(campaign, file, number, rename, digests)
    stages = campaign / "stages" / f"round={source}"
    for file in sorted(stages.iterdir(), key=lambda path: path.suffix == ".files"):  # the lists last
        target = campaign / rename(file.relative_to(campaign).as_posix())
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(_copied_text(file, source, number, rename, digests))
        digests[target.relative_to(campaign).as_posix()] = _entry(target)


def _copy_table(campaign: Path, file: Path, number: int, rename: Rename, digests: dict[str, list[int | str]]) -> None:
    table = pq.ParquetFile(file).read()
    for index, field in enumerate(table.schema):
        if pa.types.is_string(field.type):
            values = [value and rename(value) for value in table[field.name].to_pylist()]
            table = table.set_column(index, field, pa.array(values, pa.string()))
        elif field.name in ("score", "eval_score_mean"):  # rounds differ a little
            table = table.set_column(index, field, pc.subtract(table[field.name], 1e-6 * number))
    name = rename(file.relative_to(campaign).as_posix())
    (campaign / name).parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, campaign / name, compression="zstd")
    digests[name] = _entry(campaign / name)


def _copied_text(file: Path, source: int, number: int, rename: Rename, digests: dict[str, list[int | str]]) -> str:
    text = rename(file.read_text())
    if file.suffix == ".files":
        listed = {name: digests.get(name, entry) for name, entry in json.loads(text).items()}
        return json.dumps(listed, indent=0, sort_keys=True)
    return text.replace(f'"go_on_from": {source},', f'"go_on_from": {number},')


def _entry(path: Path) -> list[int | str]:
    content = path.read_bytes()
    return [len(content), hashlib.sha256(content).hexdigest()]


# MLflow's tables with rows of a round, except its parent's points.
RUN_TABLES = (
    "runs", "latest_metrics", "metrics", "params", "tags", "inputs", "logged_models", "logged_model_metrics",
    "logged_model_tags", "model_versions",
)  # fmt: skip


def copy_in_mlflow(database: Path, source: int, numbers: range) -> None:
    """Copy a round's run, model, version and points in MLflow's sqlite store to other rounds."""
    with contextlib.closing(sqlite3.connect(database)) as store:
        (run,) = store.execute("SELECT run_uuid FROM tags WHERE key = 'd3po.round' AND value = ?", (source,)).fetchone()
        (model,) = store.execute("SELECT model_id FROM logged_models WHERE source_run_id = ?", (run,)).fetchone()
        (parent,) = store.execute(
            "SELECT value FROM tags WHERE key = 'mlflow.parentRunId' AND run_uuid = ?", (run,)
        ).fetchone()
        rows = {table: _rows_about(store, table, (run, model)) for table in RUN_TABLES}
        points = store.execute("SELECT * FROM metrics WHERE run_uuid = ? AND step = ?", (parent, source)).fetchall()
        for number in numbers:
            ids = {run: uuid.uuid4().hex, model: f"m-{uuid.uuid4().hex}"}
            for table, (columns, found) in rows.items():
                for row in found:
                    _insert(store, table, _moved(dict(zip(columns, row, strict=True)), ids, source, number))
            for row in points:
                moved = [number if value == source and at == 4 else value for at, value in enumerate(row)]
                store.execute(f"INSERT INTO metrics VALUES ({', '.join('?' * len(row))})", moved)
        store.commit()


def _rows_about(store: sqlite3.Connection, table: str, ids: tuple[str, str]) -> tuple[list[str], list[tuple[object]]]:
    columns = [row[1] for row in store.execute(f"PRAGMA table_info({table})")]
    about = " OR ".join(f"instr({column}, ?)" for column in columns for _ in ids)
    return columns, store.execute(f"SELECT * FROM {table} WHERE {about}", ids * len(columns)).fetchall()


def _moved(row: dict[str, object], ids: dict[str, str], source: int, number: int) -> dict[str, object]:
    for name, value in row.items():
        if isinstance(value, str):
            for old, new in ids.items():
                value = value.replace(old, new)
            row[name] = re.sub(rf"\bround {source}\b", f"round {number}", value)
    if "input_uuid" in row:
        row["input_uuid"] = uuid.uuid4().hex
    if row.get("key") == "d3po.round":
        row["value"] = str(number)
    for name in ("version", "step", "metric_step"):  # a version per trained round
        if row.get(name) == source:
            row[name] = number
    return row


def _insert(store: sqlite3.Connection, table: str, row: dict[str, object]) -> None:
    places = ", ".join("?" * len(row))
    store.execute(f"INSERT OR IGNORE INTO {table} ({', '.join(row)}) VALUES ({places})", list(row.values()))


def lengthen(data: Path, campaign: str, source: int, last: int) -> None:
    """Copy the campaign's last finished round ``source`` to all rounds up to ``last``, on disk and in MLflow."""
    folder, numbers = data / "runs" / campaign, range(source + 1, last + 1)
    for number in numbers:
        copy_round(folder, source, number)
    copy_in_mlflow(data / "mlflow" / "mlflow.db", source, numbers)
    images = next(iter((data / "mlflow" / "artifacts").glob("*/artifacts/images")))
    for file in list(images.glob(f"*+step+{source}+*")):
        for number in numbers:
            os.link(file, images / file.name.replace(f"+step+{source}+", f"+step+{number}+"))
