"""Settle where the servers keep their data, before any of them starts."""

from collections.abc import Sequence

from d3po.flows.server_bucket import require_bucket
from d3po.flows.server_database import require_database
from d3po.flows.server_moving import require_nothing_left, require_stopped
from d3po.flows.server_stores import Stores, chosen_stores, write_stores


def use_stores(database: str | None, artifacts: str | None, anew: bool, missing: Sequence[str]) -> Stores:
    """Check the stores that Prefect and MLflow will use, remember them, and return them.

    Args:
        database: PostgreSQL's address or ``local``; by default the remembered one.
        artifacts: ``s3://bucket/prefix`` or ``local``; by default the remembered place.
        anew: leave behind what is elsewhere.
        missing: servers that do not run.

    Raises:
        D3POError: the stores cannot be used, or others still hold something.
    """
    stores = chosen_stores(database, artifacts)
    if database or artifacts:
        require_stopped(stores)
        if not anew:
            require_nothing_left(stores)
    if stores and {"prefect", "mlflow"} & set(missing):
        require_database(stores)
        require_bucket(stores)
    write_stores(stores)
    return stores
