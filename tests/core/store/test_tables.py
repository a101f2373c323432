"""The store: schemas are kept, files are whole or absent, and views show every round."""

import contextlib
import errno
import itertools
import os
import threading
from datetime import datetime
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from d3po_core.errors import D3POError
from d3po_core.store.files import atomic_path, exclusive
from d3po_core.store.images import load_png, save_png
from d3po_core.store.tables import (
    SCHEMA_VERSION,
    SCHEMAS,
    check_table,
    connect,
    read_rows,
    table_from_rows,
    write_table,
)

A_VALUE = {
    pa.string(): "x", pa.int64(): 3, pa.float64(): 0.5, pa.bool_(): True, pa.timestamp("us"): datetime(2024, 5, 1, 12),
}  # fmt: skip
CLOSED = {"split": "train", "rater_kind": "human", "kind": "choice", "reason": "unsafe"}


def row(table: str, **changes: Any) -> dict[str, Any]:
    return {field.name: CLOSED.get(field.name, A_VALUE[field.type]) for field in SCHEMAS[table]} | changes


def one(table: str, **changes: Any) -> pa.Table:
    return table_from_rows(table, [row(table, **changes)])


@pytest.mark.parametrize("table", sorted(SCHEMAS))
def test_rows_of_every_table_are_read_back_as_written(tmp_path: Path, table: str) -> None:
    rows = [row(table), row(table, **{f.name: None for f in SCHEMAS[table] if f.nullable})]
    path = write_table(tmp_path, table, 3, table_from_rows(table, rows))
    assert read_rows(path) == rows
    with connect(tmp_path) as connection:
        found = connection.sql(f"SELECT * FROM {table}").to_arrow_table().to_pylist()
    assert found == [{**r, "round": 3} for r in rows]


@pytest.mark.parametrize("table", sorted(SCHEMAS))
def test_file_says_the_version_of_its_schema(tmp_path: Path, table: str) -> None:
    path = write_table(tmp_path, table, 1, one(table))
    schema = pq.read_schema(path)
    assert schema.metadata[b"d3po.schema_version"] == str(SCHEMA_VERSION).encode()
    assert schema.equals(SCHEMAS[table])


def test_files_from_before_a_column_was_added_are_read_with_nulls(tmp_path: Path) -> None:
    old = one("judgements", value=2.0).drop_columns(["seconds", "position"])
    path = tmp_path / "judgements" / "round=1" / "part.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(old, path)
    with connect(tmp_path) as connection:
        assert connection.sql("SELECT value, seconds, position, round FROM judgements").fetchall() == [
            (2.0, None, None, 1)
        ]


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("table", ["updates", "update_steps"])
def test_what_older_files_call_otherwise_is_read_under_its_name_of_now(
    tmp_path: Path, table: str, together: bool
) -> None:
    """The first versions wrote margin and pair_accuracy of before the update, and a kl that was none."""
    former = {"margin_before": "margin", "pair_accuracy_before": "pair_accuracy", "kl_before": "kl"}
    new = one(table, margin_before=2.0, pair_accuracy_before=0.75, kl_before=3.0)
    old = new.rename_columns([former.get(name, name) for name in new.schema.names])
    path = tmp_path / table / "round=1" / "part.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(old, path)
    expected: list[tuple[Any, ...]] = [(1, 2.0, 0.75, None)]
    if together:
        write_table(tmp_path, table, 2, new)
        expected.append((2, 2.0, 0.75, 3.0))
    with connect(tmp_path) as connection:
        found = connection.sql(f"SELECT round, {', '.join(former)} FROM {table} ORDER BY round").fetchall()
        assert connection.sql(f"SELECT * FROM {table}").columns == [*SCHEMAS[table].names, "round"]
    assert found == expected


def test_row_without_a_column_is_refused_by_name() -> None:
    short = row("preferences")
    del short["weight"]
    with pytest.raises(D3POError, match=r"preferences row 1: missing columns \['weight'\]"):
        table_from_rows("preferences", [row("preferences"), short])


def test_a_row_may_leave_out_a_column_that_came_later() -> None:
    short = row("judgements")
    del short["both_bad"]
    assert table_from_rows("judgements", [short])["both_bad"].to_pylist() == [None]


def test_row_with_an_unknown_column_is_refused_by_name() -> None:
    with pytest.raises(D3POError, match=r"unknown columns \['wieght'\]"):
        table_from_rows("preferences", [row("preferences", wieght=1.0)])


@pytest.mark.parametrize(
    ("table", "change"),
    [
        ("preferences", {"weight": "heavy"}),
        ("preferences", {"winner_id": 3}),
        ("samples", {"member": 1.5}),
        ("samples", {"seed": 2**63}),
        ("judgements", {"judged_at": "yesterday"}),
    ],
)
def test_value_of_another_type_is_a_one_line_error(table: str, change: dict[str, Any]) -> None:
    with pytest.raises(D3POError, match=f"{table}.*does not fit the schema") as caught:
        one(table, **change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("table", "change", "message"),
    [
        ("preferences", {"winner_id": None}, "preferences.winner_id: 1 values are missing"),
        ("judgements", {"rater": None}, "judgements.rater: 1 values are missing"),
        ("judgements", {"value": float("nan")}, "judgements.value: holds numbers that are not finite"),
        ("judgements", {"value": float("inf")}, "judgements.value: holds numbers that are not finite"),
        ("rounds", {"loss_mean": float("-inf")}, "rounds.loss_mean: holds numbers that are not finite"),
        ("preferences", {"weight": 0.0}, r"preferences.weight: is 0.0 to 0.0; expected above 0.0, at most 1.0"),
        ("preferences", {"weight": 1.01}, "preferences.weight: is 1.01"),
        ("preferences", {"weight": -0.5}, "preferences.weight: is -0.5"),
        ("preferences", {"agreement": 0.0}, "preferences.agreement"),
        ("samples", {"split": "test"}, r"samples.split: holds \['test'\]; expected train, eval"),
        ("judgements", {"rater_kind": "robot"}, "expected proxy, human, gold"),
        ("judgements", {"kind": "hunch"}, "expected score, rating, choice, rank"),
    ],
)
def test_value_outside_its_bounds_is_refused_and_nothing_written(
    tmp_path: Path, table: str, change: dict[str, Any], message: str
) -> None:
    data = pa.Table.from_pylist([row(table), row(table, **change)], schema=SCHEMAS[table])
    data = data.slice(1)
    with pytest.raises(D3POError, match=message):
        write_table(tmp_path, table, 1, data)
    assert list(tmp_path.rglob("*.parquet")) == []


def test_bounds_that_are_just_kept_are_accepted(tmp_path: Path) -> None:
    check_table("preferences", one("preferences", weight=1.0, agreement=1.0))
    check_table("preferences", one("preferences", weight=1e-9))
    check_table("judgements", one("judgements", value=-1e300, other_id=None))


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.drop_columns(["weight"]),
        lambda data: data.append_column("note", pa.array(["x"])),
        lambda data: data.set_column(4, "weight", pa.array([1.0], pa.float32())),
        lambda data: data.set_column(5, "num_raters", pa.array([1], pa.int32())),
        lambda data: data.select(SCHEMAS["preferences"].names[::-1]),
    ],
    ids=["missing", "extra", "narrow float", "narrow int", "order"],
)
def test_table_of_another_schema_is_refused(tmp_path: Path, change: Any) -> None:
    with pytest.raises(D3POError, match=r"preferences: columns are (?s:.*)expected") as caught:
        write_table(tmp_path, "preferences", 1, change(one("preferences")))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.rglob("*.parquet")) == []


def test_writing_again_replaces_the_file_of_that_name_only(tmp_path: Path) -> None:
    write_table(tmp_path, "judgements", 1, one("judgements", value=1.0), name="proxy")
    write_table(tmp_path, "judgements", 1, one("judgements", value=2.0), name="web")
    write_table(tmp_path, "judgements", 1, one("judgements", value=3.0), name="proxy")
    with connect(tmp_path) as connection:
        assert connection.sql("SELECT value FROM judgements ORDER BY value").fetchall() == [(2.0,), (3.0,)]


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "disk full while writing .*free some space"),
        (errno.EDQUOT, "disk full while writing .*free some space"),
        (errno.EROFS, "cannot write .*set runs_dir"),
        (errno.EACCES, "cannot write .*set runs_dir"),
    ],
)
def test_failing_write_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, message: str
) -> None:
    path = write_table(tmp_path, "preferences", 1, one("preferences", weight=0.25))
    before = path.read_bytes()

    def half_written(data: pa.Table, where: Path, **options: Any) -> None:
        where.write_bytes(b"PAR1 and no more")
        raise OSError(number, "simulated")

    monkeypatch.setattr(pq, "write_table", half_written)
    with pytest.raises(D3POError, match=message) as caught:
        write_table(tmp_path, "preferences", 1, one("preferences", weight=0.75))
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [path]


def test_folder_that_cannot_be_made_is_told_and_a_missing_file_inside_is_not_taken_for_it(tmp_path: Path) -> None:
    with (
        pytest.raises(D3POError, match=r"cannot write /proc/none/here/x.json .*D3PO_DATA"),
        atomic_path(Path("/proc/none/here/x.json")),
    ):
        raise AssertionError("nothing can be written there")
    with pytest.raises(FileNotFoundError), atomic_path(tmp_path / "x.json"):
        (tmp_path / "missing").read_text()


def test_block_that_raises_leaves_no_temporary_file(tmp_path: Path) -> None:
    def interrupted() -> None:
        with atomic_path(tmp_path / "new.json") as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_temporary_file_is_no_part_of_any_view(tmp_path: Path) -> None:
    path = write_table(tmp_path, "preferences", 1, one("preferences"))
    with atomic_path(path) as temporary:
        temporary.write_bytes(b"not yet parquet")
        with connect(tmp_path) as connection:
            assert connection.sql("SELECT count(*) FROM preferences").fetchall() == [(1,)]
        temporary.write_bytes(path.read_bytes())


@pytest.mark.parametrize("blocked", ["campaign", "campaign/preferences", "campaign/preferences/round=1"])
def test_file_where_a_folder_should_be_is_a_one_line_error(tmp_path: Path, blocked: str) -> None:
    (tmp_path / blocked).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / blocked).write_text("in the way")
    with pytest.raises(D3POError, match="cannot write") as caught:
        write_table(tmp_path / "campaign", "preferences", 1, one("preferences"))
    assert "\n" not in str(caught.value)


def test_readers_never_fail_while_rounds_are_written_and_written_again(tmp_path: Path) -> None:
    """What a resumed stage does: the same rows again under the same name, beside new rounds."""
    data = table_from_rows("preferences", [row("preferences", weight=1.0)] * 500)
    write_table(tmp_path, "preferences", 1, data)
    stop, failures, counts = threading.Event(), [], []

    def keep_writing() -> None:
        for number in itertools.count(2):
            if stop.is_set():
                break
            write_table(tmp_path, "preferences", 1, data)
            write_table(tmp_path, "preferences", min(number, 30), data)

    writer = threading.Thread(target=keep_writing)
    writer.start()
    try:
        for _ in range(40):
            try:
                with connect(tmp_path) as connection:
                    counts += connection.sql("SELECT count(*), sum(weight) FROM preferences").fetchall()
            except duckdb.Error as error:
                failures.append(str(error))
    finally:
        stop.set()
        writer.join()
    assert failures == []
    assert all(count == weight and count % 500 == 0 for count, weight in counts)
    assert counts == sorted(counts)
    assert counts[-1][0] > 500


def test_views_span_rounds_and_say_which(tmp_path: Path) -> None:
    for number in (1, 2, 10):
        write_table(tmp_path, "preferences", number, one("preferences", weight=number / 10))
    with connect(tmp_path) as connection:
        found = connection.sql("SELECT round, weight FROM preferences ORDER BY round").fetchall()
        assert found == [(1, 0.1), (2, 0.2), (10, 1.0)]
        assert connection.sql("SELECT sum(round) FROM preferences WHERE round > 1").fetchall() == [(12,)]


def test_column_added_later_is_null_in_older_rounds(tmp_path: Path) -> None:
    write_table(tmp_path, "preferences", 1, one("preferences"))
    newer = one("preferences").append_column("why", pa.array(["sharper"]))
    (tmp_path / "preferences" / "round=2").mkdir()
    pq.write_table(newer, tmp_path / "preferences" / "round=2" / "part.parquet")
    with connect(tmp_path) as connection:
        found = connection.sql("SELECT round, why FROM preferences ORDER BY round").fetchall()
    assert found == [(1, None), (2, "sharper")]


@pytest.mark.parametrize("table", sorted(SCHEMAS))
def test_table_without_files_is_an_empty_view_with_its_columns(tmp_path: Path, table: str) -> None:
    with connect(tmp_path / "never started") as connection:
        found = connection.sql(f"SELECT * FROM {table}")
        assert found.columns == [*SCHEMAS[table].names, "round"]
        assert found.fetchall() == []


def test_table_of_no_rows_is_written_and_read(tmp_path: Path) -> None:
    write_table(tmp_path, "preferences", 1, table_from_rows("preferences", []))
    write_table(tmp_path, "preferences", 2, one("preferences"))
    with connect(tmp_path) as connection:
        assert connection.sql("SELECT round FROM preferences").fetchall() == [(2,)]


@pytest.mark.parametrize("folder", ["it's here", "with space", "runs [old]", "a*b", "what?", "round=7"])
def test_folder_of_any_name_can_be_read(tmp_path: Path, folder: str) -> None:
    write_table(tmp_path / folder, "preferences", 2, one("preferences"))
    with connect(tmp_path / folder) as connection:
        assert connection.sql("SELECT round, weight FROM preferences").fetchall() == [(2, 0.5)]


def test_images_are_stored_without_loss(tmp_path: Path) -> None:
    image = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    save_png(image, tmp_path / "images" / "one.png")
    assert np.array_equal(load_png(tmp_path / "images" / "one.png"), image)
    assert [file.name for file in (tmp_path / "images").iterdir()] == ["one.png"]


@pytest.mark.parametrize("name", ["folder", "made/for/it.lock"])
def test_only_one_holds_what_is_exclusive_and_the_next_gets_it_when_that_one_ends(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    with contextlib.suppress(KeyError), exclusive(tmp_path / name):
        with pytest.raises(BlockingIOError), exclusive(tmp_path / name, wait=False):
            pytest.fail("two hold it")
        raise KeyError
    with exclusive(tmp_path / name, wait=False):
        pass


def test_lock_file_has_the_permissions_that_were_asked_for(tmp_path: Path) -> None:
    with exclusive(tmp_path / "lock", mode=0o600):
        assert (tmp_path / "lock").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("number", [errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS])
def test_file_system_without_locks_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    with (
        pytest.raises(D3POError, match=r"the file system of .*lock has no locks .*; keep the data on a local disk"),
        exclusive(tmp_path / "lock"),
    ):
        pytest.fail("nobody may hold it")
