"""Keep our MLflow store working when its data folder moves: MLflow stores absolute paths, and would use the old ones.

This changes only the database in the data folder, and only paths inside that folder: an experiment with artifacts
elsewhere stays as it is. A copied data folder points to itself, and its original is left alone.
"""

import contextlib
import sqlite3
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

ARTIFACTS = "mlflow/artifacts"
# Columns where MLflow keeps artifact locations, and columns of our texts that name the data folder.
PLACES = (
    ("experiments", "artifact_location"), ("runs", "artifact_uri"), ("logged_models", "artifact_location"),
    ("model_versions", "storage_location"), ("model_versions", "source"),
)  # fmt: skip
TEXTS = (
    ("tags", "value"), ("datasets", "dataset_source"), ("model_versions", "description"),
    ("logged_model_tags", "tag_value"),
)  # fmt: skip


def follow_folder(database: Path, experiment: str) -> Path | None:
    """Rewrite the store's paths to its present folder, in one transaction; return the old folder, if any.

    Args:
        database: ``<data folder>/mlflow/mlflow.db``; without it, nothing is done.
        experiment: name of the experiment whose artifacts lie in the data folder.
    """
    if not database.exists():
        return None
    folder = database.parent.parent
    with contextlib.closing(sqlite3.connect(f"file:{quote(str(database))}?mode=rw", uri=True, timeout=60)) as store:
        old = _old_folder(store, experiment)
        if old is None or old == folder:
            return None
        _move(store, old, folder)
        return old


def _old_folder(store: sqlite3.Connection, experiment: str) -> Path | None:
    if not store.execute("SELECT 1 FROM sqlite_master WHERE name = 'experiments'").fetchone():
        return None
    row = store.execute("SELECT artifact_location FROM experiments WHERE name = ?", (experiment,)).fetchone()
    if row is None or not str(row[0]).startswith("file:///"):
        return None
    artifacts = Path(unquote(urlsplit(row[0]).path))
    return artifacts.parent.parent if artifacts.match(ARTIFACTS) else None


def _move(store: sqlite3.Connection, old: Path, new: Path) -> None:
    before, after = ((folder / ARTIFACTS).as_uri() for folder in (old, new))
    with store:
        for table, column in TEXTS:
            store.execute(
                f"UPDATE {table} SET {column} = replace({column}, ?, ?) WHERE instr({column}, ?)",
                (f"{old}/", f"{new}/", f"{old}/"),
            )
        for table, column in PLACES:
            store.execute(
                f"UPDATE {table} SET {column} = ? || substr({column}, ?) "
                f"WHERE {column} = ? OR substr({column}, 1, ?) = ?",
                (after, len(before) + 1, before, len(before) + 1, f"{before}/"),
            )
