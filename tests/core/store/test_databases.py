"""Databases that other programs make: any path, and a kill at any time leaves a whole one or one that is made again."""

import contextlib
import sqlite3
from pathlib import Path

import pytest
import sqlalchemy

from d3po_core.errors import D3POError
from d3po_core.store.databases import is_whole, make_database, sqlite_url


def fill(file: Path, rows: int = 1) -> None:
    with contextlib.closing(sqlite3.connect(file)) as database:
        database.execute("CREATE TABLE things (name TEXT)")
        database.executemany("INSERT INTO things VALUES (?)", [("x",)] * rows)
        database.commit()


@pytest.mark.parametrize("name", ["plain", "with space", "what?now", "proj#1", "50%41", "größe", "a?b#c%3Fd&uri=1"])
def test_sqlalchemy_opens_the_database_that_the_path_names(tmp_path: Path, name: str) -> None:
    file = tmp_path / name / "own.db"
    file.parent.mkdir()
    fill(file)
    engine = sqlalchemy.create_engine(sqlite_url(file))
    with engine.connect() as connection:
        assert connection.execute(sqlalchemy.text("SELECT name FROM things")).fetchall() == [("x",)]
    engine.dispose()
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_database_is_whole_or_not_there_when_making_it_is_killed(tmp_path: Path) -> None:
    def killed(file: Path) -> None:
        fill(file, rows=0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_database(tmp_path / "own.db", killed, "things")
    assert not (tmp_path / "own.db").exists()
    make_database(tmp_path / "own.db", fill, "things")
    assert is_whole(tmp_path / "own.db", "things")
    assert {path.name for path in tmp_path.iterdir()} == {"own.db", ".own.db.lock"}
    make_database(tmp_path / "own.db", killed, "things")  # is there, and so not made again


@pytest.mark.parametrize("left", ["empty file", "no table", "no row"])
def test_half_made_database_is_put_aside_and_made_again(tmp_path: Path, left: str) -> None:
    file = tmp_path / "own.db"
    if left == "empty file":
        file.touch()
    elif left == "no table":
        sqlite3.connect(file).execute("CREATE TABLE other (name TEXT)").connection.close()
    else:
        fill(file, rows=0)
    before = file.read_bytes()
    make_database(file, fill, "things")
    assert is_whole(file, "things")
    assert (tmp_path / "own.db.half-made").read_bytes() == before


def test_what_is_no_database_is_left_alone_and_said_in_one_line(tmp_path: Path) -> None:
    file = tmp_path / "own.db"
    file.write_text("these are somebody's notes, longer than a header of SQLite " * 10)
    with pytest.raises(D3POError, match=r"own\.db is no database \(.*\); restore it, or move it away"):
        make_database(file, fill, "things")
    assert file.read_text().startswith("these are")
