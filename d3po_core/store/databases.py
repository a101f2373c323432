"""SQLite databases that other programs make: their addresses, and how a kill in between leaves a whole one or none."""

import contextlib
import sqlite3
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote
from uuid import uuid4

from d3po_core.errors import D3POError
from d3po_core.store.files import disk_errors, exclusive


def sqlite_url(file: Path, driver: str = "sqlite") -> str:
    """SQLAlchemy's address of a database; the path may hold any characters.

    Args:
        file: the database, an absolute path.
        driver: ``sqlite``, or with SQLAlchemy's name of another driver: ``sqlite+aiosqlite``.
    """
    if not set("?#%") & set(str(file)):
        return f"{driver}:///{file}"
    # SQLAlchemy would take what follows "?" for options, and others "#" for a fragment: SQLite decodes its own form.
    # With the driver's name, since MLflow makes the folder of a plain sqlite address, taking "file:" for one.
    driver = "sqlite+pysqlite" if driver == "sqlite" else driver
    return f"{driver}:///file:{quote(str(file))}?uri=true"


def make_database(file: Path, make: Callable[[Path], None], table: str) -> None:
    """Make a database unless a whole one is there: under another name, then renamed.

    One that was left half made, by a kill in an earlier version, is put aside as ``<name>.half-made`` and made again.

    Args:
        file: the database.
        make: makes one at the path that it is given.
        table: a table that has a row as soon as the database is whole, and none before.

    Raises:
        D3POError: the folder cannot be written, or ``file`` is no database.
    """
    if is_whole(file, table):
        return
    with exclusive(file.with_name(f".{file.name}.lock")), disk_errors(file):
        if is_whole(file, table):
            return
        for rest in file.parent.glob(f".{file.name}.*.tmp*"):  # of one that was killed
            rest.unlink()
        # A new name each time: MLflow remembers stores by their address.
        temporary = file.with_name(f".{file.name}.{uuid4().hex}.tmp")
        make(temporary)
        if file.exists():
            file.rename(file.with_name(f"{file.name}.half-made"))
        for end in ("-journal", "-wal", "-shm"):  # of the half-made one: SQLite would play them into the whole one
            file.with_name(file.name + end).unlink(missing_ok=True)
        temporary.rename(file)


def is_whole(file: Path, table: str) -> bool:
    """Whether a database is there and its table has a row.

    Raises:
        D3POError: there is a file, and it is no database.
    """
    if not file.is_file() or not file.stat().st_size:
        return False
    try:
        with contextlib.closing(sqlite3.connect(f"file:{quote(str(file))}?mode=rw", uri=True)) as database:
            return database.execute(f'SELECT 1 FROM "{table}" LIMIT 1').fetchone() is not None
    except sqlite3.OperationalError as error:
        return "no such table" not in str(error)  # busy or not readable: whoever uses it says so better
    except sqlite3.DatabaseError as error:
        raise D3POError(f"{file} is no database ({error}); restore it, or move it away to begin a new one") from None
