"""The store: Parquet tables with explicit schemas, written atomically, read through DuckDB."""

import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from d3po_core.errors import D3POError
from d3po_core.store.at_hand import bring_tables
from d3po_core.store.files import atomic_path
from d3po_core.store.integrity import noted_names, require_files, require_whole

# 2: judgements gained `seconds` and `position`, and `value` may be null.
# 3: added the table comparisons, and intervals of the win rates in `rounds`.
# 4: columns measured before an update end in `_before`; `kl`, which was no KL, became `kl_before`; `rounds` gained the
# `_after` columns.
# 5: judgements and comparisons gained `both_bad`; added the table image_reports.
# 6: added the table image_labels, and `num_units`, `gradient_factor` and the winner's and loser's errors.
# 7: samples and evaluations gained `height` and `width`.
SCHEMA_VERSION = 7


def _schema(**columns: pa.DataType | tuple[pa.DataType, bool]) -> pa.Schema:
    fields = [pa.field(n, *(t if isinstance(t, tuple) else (t, False))) for n, t in columns.items()]
    return pa.schema(fields, metadata={"d3po.schema_version": str(SCHEMA_VERSION)})


# Times are UTC without a zone: to read zoned times, DuckDB would have to download an extension.
_text, _int, _real, _time, _yes = pa.string(), pa.int64(), pa.float64(), pa.timestamp("us"), pa.bool_()
SCHEMAS: dict[str, pa.Schema] = {
    "samples": _schema(
        sample_id=_text, group_id=_text, member=_int, prompt=_text, split=_text, seed=_int, image_path=_text,
        trajectory_path=_text, trajectory_row=_int, checkpoint=(_text, True), height=(_int, True), width=(_int, True),
    ),
    "groups": _schema(group_id=_text, dissimilarity=_real),
    "judgements": _schema(
        rater=_text, rater_kind=_text, kind=_text, sample_id=_text, other_id=(_text, True), value=(_real, True),
        judged_at=_time, source=_text, seconds=(_real, True), position=(_int, True), both_bad=(_yes, True),
    ),
    "preferences": _schema(
        pair_id=_text, group_id=_text, winner_id=_text, loser_id=_text, weight=_real, num_raters=_int, agreement=_real,
    ),
    "image_labels": _schema(sample_id=_text, group_id=_text, reward=(_real, True), good=(_yes, True)),
    "updates": _schema(
        update=_int, epoch=_int, num_pairs=_int, loss=_real, margin_before=(_real, True),
        pair_accuracy_before=(_real, True), kl_before=(_real, True), clip_fraction=_real, grad_norm=_real,
        drowned=_real, seconds=_real, finished_at=_time, num_units=(_int, True), winner_error_before=(_real, True),
        loser_error_before=(_real, True), gradient_factor=(_real, True),
    ),
    "update_steps": _schema(
        update=_int, step=_int, timestep=_int, margin_before=(_real, True), pair_accuracy_before=(_real, True),
        kl_before=(_real, True), clip_fraction=_real, winner_error_before=(_real, True),
        loser_error_before=(_real, True), gradient_factor=(_real, True),
    ),
    "evaluations": _schema(
        sample_id=_text, prompt=_text, seed=_int, scorer=_text, score=_real, image_path=_text, checkpoint=(_text, True),
        height=(_int, True), width=(_int, True),
    ),
    # Kept apart from judgements, which become preferences: these are about held-out images.
    "comparisons": _schema(
        comparison=_text, against=_int, rater=_text, sample_id=_text, against_id=_text, value=(_real, True),
        judged_at=_time, seconds=(_real, True), position=_int, both_bad=(_yes, True),
    ),
    "image_reports": _schema(sample_id=_text, rater=_text, reason=_text, image_sha256=_text, reported_at=_time),
    "rounds": _schema(
        checkpoint_in=(_text, True), checkpoint_out=(_text, True), lora_sha256=(_text, True), num_samples=_int,
        num_pairs=_int, num_ties=_int, eval_scorer=_text, eval_score_mean=_real, eval_score_low=(_real, True),
        eval_score_high=(_real, True), loss_mean=(_real, True), clip_fraction=(_real, True),
        pair_accuracy_before=(_real, True), mlflow_run_id=(_text, True), config_sha256=_text, git_commit=(_text, True),
        sample_seconds=_real, judge_seconds=_real, derive_seconds=_real, train_seconds=_real, evaluate_seconds=_real,
        publish_seconds=_real,
        finished_at=_time, label_seconds=(_real, True), diversity=(_real, True), drift=(_real, True),
        win_rate_base=(_real, True), win_rate_before=(_real, True), win_rate_champion=(_real, True),
        champion=(_int, True), verdict=(_text, True), findings=(_text, True), win_rate_base_low=(_real, True),
        win_rate_base_high=(_real, True), win_rate_before_low=(_real, True), win_rate_before_high=(_real, True),
        win_rate_champion_low=(_real, True), win_rate_champion_high=(_real, True), pair_accuracy_after=(_real, True),
        margin_after=(_real, True), kl_after=(_real, True), drowned=(_real, True), winner_error_after=(_real, True),
        loser_error_after=(_real, True), gradient_factor=(_real, True),
    ),
}  # fmt: skip

# Columns of older files -> their names today, or None if their numbers were wrong.
FORMER: dict[str, dict[str, str | None]] = {
    "updates": {"margin": "margin_before", "pair_accuracy": "pair_accuracy_before", "kl": None},
    "update_steps": {"margin": "margin_before", "pair_accuracy": "pair_accuracy_before", "kl": None},
    "rounds": {"pair_accuracy": "pair_accuracy_before"},
}

# Columns that a row may leave out; they are null then.
_ERRORS = ("winner_error_before", "loser_error_before", "gradient_factor")
OPTIONAL = {
    "samples": ("height", "width"), "evaluations": ("height", "width"),
    "judgements": ("both_bad",), "comparisons": ("both_bad",), "updates": ("num_units", *_ERRORS),
    "update_steps": _ERRORS, "rounds": ("winner_error_after", "loser_error_after", "gradient_factor"),
}  # fmt: skip

# Closed sets and ranges that a schema cannot express.
ALLOWED = {
    ("samples", "split"): ("train", "eval"),
    ("judgements", "rater_kind"): ("proxy", "human", "gold"),
    ("judgements", "kind"): ("score", "rating", "choice", "rank"),
    ("image_reports", "reason"): ("unsafe", "broken", "withdrawn"),
}
RANGES = {("preferences", "weight"): (0.0, 1.0), ("preferences", "agreement"): (0.0, 1.0)}


def table_from_rows(table: str, rows: list[dict[str, Any]]) -> pa.Table:
    """Return rows as an Arrow table with the named table's schema.

    Raises:
        D3POError: a row lacks a column, has an unknown one, or has a value of the wrong type.
    """
    schema = SCHEMAS[table]
    rows = [dict.fromkeys(OPTIONAL.get(table, ())) | row for row in rows]
    for index, row in enumerate(rows):
        if row.keys() != set(schema.names):
            missing, extra = set(schema.names) - row.keys(), row.keys() - set(schema.names)
            raise D3POError(f"{table} row {index}: missing columns {sorted(missing)}, unknown columns {sorted(extra)}")
    whole = [field.name for field in schema if pa.types.is_integer(field.type)]
    for index, row in enumerate(rows):  # Arrow would silently cut 1.5 to 1
        for name in whole:
            if isinstance(row[name], float):
                raise D3POError(f"{table} row {index}: {name} is {row[name]} and does not fit the schema; expected int")
    try:
        return pa.Table.from_pylist(rows, schema=schema)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
        raise D3POError(f"{table}: a value does not fit the schema ({error})") from None


def joined(table: str, parts: list[pa.Table]) -> pa.Table:
    """Return a table's parts as one; those of an earlier version, which lack optional columns, get nulls there."""
    whole = []
    for part in parts:
        for place, field in enumerate(SCHEMAS[table]):
            if field.name not in part.schema.names and field.nullable:
                part = part.add_column(place, field, pa.nulls(len(part), field.type))
        whole.append(part.replace_schema_metadata(SCHEMAS[table].metadata))
    return pa.concat_tables(whole)


def check_table(table: str, data: pa.Table) -> None:
    """Check a table against its schema: names, types, nulls, closed sets, ranges.

    Raises:
        D3POError: the first check that fails.
    """
    schema = SCHEMAS[table]
    if data.schema.names != schema.names or data.schema.types != schema.types:
        found, expected = (", ".join(f"{f.name} {f.type}" for f in s) for s in (data.schema, schema))
        raise D3POError(f"{table}: columns are {found}; expected {expected}")
    for field in schema:
        column = data[field.name]
        if column.null_count and not field.nullable:
            raise D3POError(f"{table}.{field.name}: {column.null_count} values are missing; expected none")
        if pa.types.is_floating(field.type) and pc.any(pc.invert(pc.is_finite(column.drop_null()))).as_py():
            raise D3POError(f"{table}.{field.name}: holds numbers that are not finite")
        allowed = ALLOWED.get((table, field.name))
        if allowed and set(pc.unique(column).to_pylist()) - set(allowed):
            raise D3POError(
                f"{table}.{field.name}: holds {pc.unique(column).to_pylist()}; expected {', '.join(allowed)}"
            )
        bounds = RANGES.get((table, field.name))
        if bounds and len(column):
            low, high = pc.min(column).as_py(), pc.max(column).as_py()
            if low <= bounds[0] or high > bounds[1]:
                raise D3POError(
                    f"{table}.{field.name}: is {low} to {high}; expected above {bounds[0]}, at most {bounds[1]}"
                )


def partition(campaign: Path, table: str, round_number: int) -> Path:
    """Return the folder of a table's files for one round."""
    return campaign / table / f"round={round_number}"


def write_table(campaign: Path, table: str, round_number: int, data: pa.Table, name: str = "part") -> Path:
    """Check a table and write it as one file of a round, whole or not at all, replacing any older one.

    Returns:
        The file's path.

    Raises:
        D3POError: the data breaks the schema, or the disk is full or read-only.
    """
    check_table(table, data)
    data = data.cast(SCHEMAS[table])
    path = partition(campaign, table, round_number) / f"{name}.parquet"
    with atomic_path(path) as temporary:
        pq.write_table(data, temporary, compression="zstd")
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return all rows of one Parquet file, without hive columns from its folder.

    Raises:
        D3POError: the file is gone, damaged, or not what a finished stage wrote.
    """
    if path.parent.name.startswith("round="):
        campaign = path.parents[2]
        require_files(campaign, [path.relative_to(campaign).as_posix()])
    try:
        return pq.ParquetFile(path).read().to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from None


def _require_readable(campaign: Path, tables: Iterable[str], rounds: Collection[int] | None) -> None:
    """Check that table files that no stage listed, as in earlier versions, are at least Parquet files."""
    noted = noted_names(campaign, rounds, tables)
    for name in sorted({name for table in tables for name in _files(campaign, table, rounds)} - noted):
        try:
            pq.read_metadata(campaign / name)
        except FileNotFoundError:  # a running round replaces its files
            continue
        except (OSError, pa.ArrowException) as error:
            raise _unreadable(campaign / name, error) from None


def _files(campaign: Path, table: str, rounds: Collection[int] | None) -> list[str]:
    """Return the paths in the campaign of a table's files, of the given rounds or of all."""
    top = campaign / table
    there = os.listdir(top) if top.is_dir() else []  # a long campaign has a thousand folders, and globs are slow
    wanted = there if rounds is None else {f"round={number}" for number in rounds}.intersection(there)
    folders = [folder for folder in wanted if folder.startswith("round=") and os.path.isdir(f"{top}/{folder}")]
    files = [f"{folder}/{file}" for folder in folders for file in os.listdir(f"{top}/{folder}")]
    return [f"{table}/{name}" for name in files if name.endswith(".parquet")]


def _unreadable(path: Path, error: Exception) -> D3POError:
    campaign = path.parents[2] if path.parent.name.startswith("round=") else path.parent
    reason = "is gone" if isinstance(error, FileNotFoundError) else "is no readable Parquet file"
    return D3POError(f"campaign {campaign.name!r}: {path.relative_to(campaign)} {reason}; restore it from a copy")


def connect(
    campaign: Path, tables: Collection[str] = tuple(SCHEMAS), rounds: Collection[int] | None = None
) -> duckdb.DuckDBPyConnection:
    """Return an in-memory DuckDB with one view per table; tables without files are empty.

    Args:
        campaign: the campaign's folder.
        tables: the tables to check and to offer. Each has a file per round, so name few in what runs every round.
        rounds: the rounds to check and to offer; all when not given.
    """
    bring_tables(campaign, tables, rounds)
    require_whole(campaign, rounds, tables)
    _require_readable(campaign, tables, rounds)
    connection = duckdb.connect(":memory:")
    for table in tables:
        former = FORMER.get(table, {})
        # An empty table with today's schema: in older files, columns added since then read as null.
        added = [pa.field("round", pa.int64()), *(pa.field(name, _real) for name in former)]
        connection.register(f"_{table}", pa.schema([*SCHEMAS[table], *added]).empty_table())
        rows = f"SELECT * FROM _{table}"
        if sources := _sources(campaign, table, rounds):
            # Take the round from the file's own folder, since folders above may also have key=value names.
            rows += (
                " UNION ALL BY NAME SELECT * EXCLUDE (filename), "
                "CAST(regexp_extract(filename, 'round=([0-9]+)[/\\\\][^/\\\\]*$', 1) AS BIGINT) AS round "
                f"FROM read_parquet([{sources}], hive_partitioning=false, filename=true, union_by_name=true)"
            )
        if former:
            now = ", ".join(f"coalesce({name}, {old}) AS {name}" for old, name in former.items() if name)
            rows = f"SELECT * EXCLUDE ({', '.join(former)}) REPLACE ({now}) FROM ({rows})"
        connection.execute(f"CREATE VIEW {table} AS {rows}")
    return connection


def _sources(campaign: Path, table: str, rounds: Collection[int] | None) -> str:
    """Return the patterns of a table's files for DuckDB, which refuses one without files; "" if there are none."""
    folder = re.sub(r"([\[*?])", r"[\1]", str(campaign / table)).replace("'", "''")
    there = sorted({name.split("/")[1] for name in _files(campaign, table, rounds)})
    names = ["round=*"] if there and rounds is None else there
    return ", ".join(f"'{folder}/{name}/*.parquet'" for name in names)
