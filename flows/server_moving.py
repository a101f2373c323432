"""Refuse to leave behind what the servers keep now, when they move to another database or bucket, unless told to."""

import contextlib
import sqlite3
from pathlib import Path
from urllib.parse import quote

from d3po.flows.server_processes import leader
from d3po.flows.server_stores import LOCAL, Stores, read_stores, server_of, url_of
from d3po_core.errors import D3POError
from d3po_core.paths import data_folder

ANEW = (
    "MLflow gets every campaign again with its next round; Prefect's runs, also those that wait for people, and its "
    "schedules stay behind. To start anew there all the same, add --anew"
)


def require_stopped(stores: Stores) -> None:
    """Refuse to change the stores under running servers.

    Raises:
        D3POError: Prefect or MLflow runs on others.
    """
    running = [name for name in ("prefect", "mlflow") if leader(name)]
    if running and _place(stores) != _place(read_stores()):
        raise D3POError(
            f"{' and '.join(running)} run on {_shown(read_stores())}; type `d3po down` first, then this again"
        )


def require_nothing_left(stores: Stores) -> None:
    """Refuse to move to other stores while the present ones hold something.

    Raises:
        D3POError: they do; the message says what, where, and how to go on.
    """
    try:
        before = read_stores()
    except D3POError:  # damaged, and now replaced
        return
    (database, artifacts), (new_database, new_artifacts) = _place(before), _place(stores)
    if not before and stores and (held := _held_locally()):
        raise D3POError(f"data folder {data_folder()} holds {held}, which a database would not show. {ANEW}")
    if before and database != new_database:
        raise D3POError(f"the servers used {_shown(before)} until now, whose contents {_shown(stores)} lacks. {ANEW}")
    if database == new_database and artifacts != new_artifacts:
        here, there = (
            f"{data_folder()}/mlflow/artifacts" if one == LOCAL else one for one in (artifacts, new_artifacts)
        )
        raise D3POError(
            f"MLflow's artefacts are in {here}; copy them: `aws s3 sync {here} {there}`, then type this "
            "again with --anew"
        )


def _held_locally() -> str:
    """What the data folder's own databases hold, in words; empty if nothing."""
    runs = _count(
        data_folder() / "prefect" / "prefect.db", "SELECT count(*) FROM flow_run WHERE state_type != 'SCHEDULED'"
    )
    campaigns = _count(data_folder() / "mlflow" / "mlflow.db", "SELECT count(*) FROM runs")
    found = {"runs of Prefect in prefect/prefect.db": runs, "runs of MLflow in mlflow/mlflow.db": campaigns}
    return " and ".join(f"{number} {what}" for what, number in found.items() if number)


def _count(file: Path, query: str) -> int:
    if not file.is_file():
        return 0
    with contextlib.closing(sqlite3.connect(f"file:{quote(str(file))}?mode=ro", uri=True, timeout=5)) as database:
        try:
            return int(database.execute(query).fetchone()[0])
        except sqlite3.Error:  # no tables yet
            return 0


def _place(stores: Stores) -> tuple[str, str]:
    """What makes two choices different: not the password, nor the user who logs in."""
    if not stores:
        return (LOCAL, LOCAL)
    url = url_of(stores["database"])
    return (f"{url.host}:{url.port}/{url.database}", stores.get("artifacts", LOCAL))


def _shown(stores: Stores) -> str:
    return f"PostgreSQL at {server_of(stores)}" if stores else f"the files of {data_folder()}"
