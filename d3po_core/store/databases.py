"""SQLite databases that other programs make: their addresses, and making one whole or not at all."""

import contextlib
import sqlite3
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote
from uuid import uuid4

from d3po_core.errors import D3POError
from d3po_core.store.files import disk_errors, exclusive


def sqlite_url(file: Path, driver: str = "sqlite") -> str:
    """Return SQLAlchemy's address of a database; the path may hold any characters.

    Args:
        file: the database, an absolute path.
        driver: ``sqlite``, or one that also names a driver, such as ``sqlite+aiosqlite``.
    """
    if not set("?#%") & set(str(file)):
        return f"{driver}:///{file}"
    # SQLAlchemy reads "?" as the start of options, and others read "#" as a fragment. SQLite decodes its own form.
    # Without the driver's name, MLflow would make a folder called "file:".
    driver = "sqlite+pysqlite" if driver == "sqlite" else driver
    return f"{driver}:///file:{quote(str(file))}?uri=true"


def make_database(file: Path, make: Callable[[Path], None], table: str) -> None:
    """Make a database under a temporary name and rename it, unless a whole one exists.

    Earlier versions could leave a half-made file when killed. Keep it as ``<name>.half-made`` and make a new one.

    Args:
        file: the database.
        make: makes a database at the given path.
        table: a table that has a row once the database is whole, and none before.

    Raises:
        D3POError: the folder cannot be written, or ``file`` is no database.
    """
    if is_whole(file, table):
        return
    with exclusive(file.with_name(f".{file.name}.lock")), disk_errors(file):
        if is_whole(file, table):
            return
        for rest in file.parent.glob(f".{file.name}.*.tmp*"):  # left by a killed process
            rest.unlink()
        # A new name each time: MLflow remembers stores by their address.
        temporary = file.with_name(f".{file.name}.{uuid4().hex}.tmp")
        make(temporary)
        if file.exists():
            file.rename(file.with_name(f"{file.name}.half-made"))
        for end in ("-journal", "-wal", "-shm"):  # SQLite would replay the half-made file's into the new one
            file.with_name(file.name + end).unlink(missing_ok=True)
        temporary.rename(file)


def is_whole(file: Path, table: str) -> bool:
    """Return whether a database exists and its table has a row.

    Raises:
        D3POError: the file exists and is not a database.
    """
    if not file.is_file() or not file.stat().st_size:
        return False
    try:
        with contextlib.closing(sqlite3.connect(f"file:{quote(str(file))}?mode=rw", uri=True)) as database:
            return database.execute(f'SELECT 1 FROM "{table}" LIMIT 1').fetchone() is not None
    except sqlite3.OperationalError as error:
        return "no such table" not in str(error)  # busy or unreadable: whoever opens it gives a better error
    except sqlite3.DatabaseError as error:
        raise D3POError(f"{file} is no database ({error}); restore it, or move it away to begin a new one") from None
