"""MLflow's own page of runs, set up for one campaign: a saved view, which is a tag of the experiment, and its address.

MLflow 3.17 lists saved views under *Views*. A view holds a filter, an order and columns as its page keeps them.
"""

import contextlib
import json
import sqlite3
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

EXPERIMENT = "d3po"
VIEW = "mlflow.sharedViewState."
NAME = "rounds of "
RUN_NAME = "attributes.`Run Name`"
# Without it the page opens in its other mode, which hides runs.
TRAINING = "?workflowType=machine_learning"


def experiment_page(experiment: str) -> str:
    """Path of the experiment's runs, after the address of MLflow's page."""
    return f"/#/experiments/{experiment}/runs"


def view_page(experiment: str, key: str) -> str:
    """Path of a saved view of the experiment's runs, after the address of MLflow's page."""
    return f"{experiment_page(experiment)}{TRAINING}&viewStateShareKey={key}"


def rounds_view(campaign: str, campaign_run: str, scorers: list[str], created: datetime) -> str:
    """Return a view of a campaign's rounds, the best held-out score first, as the value of its tag.

    Args:
        campaign: the campaign's name on MLflow's pages.
        campaign_run: id of the campaign's run.
        scorers: that score held-out images; the first one orders the rounds.
        created: when the campaign began.
    """
    metrics = [f"held_out/{scorer}" for scorer in scorers] + ["held_out/win_rate/base", "held_out/human_win_rate/base"]
    columns = [*(f"metrics.`{name}`" for name in metrics), "tags.`d3po.verdict`"]
    state = {
        "searchFilter": f"tags.`mlflow.parentRunId` = '{campaign_run}'",
        "orderByKey": columns[0], "orderByAsc": False,
        "selectedColumns": columns, "columnOrder": [RUN_NAME, *columns],
        "columnWidths": {**dict.fromkeys(columns, 170), RUN_NAME: 370},
    }  # fmt: skip
    at = int(created.timestamp() * 1000)
    view = {"name": NAME + campaign, "createdAt": at, "updatedAt": at, "state": json.dumps(state)}
    return json.dumps(view)


def saved_view(database: Path, key: str | None = None) -> tuple[str, str] | None:
    """Return name and path of a campaign's view, without loading MLflow; None if there is none.

    Args:
        database: MLflow's sqlite file.
        key: the campaign's id; the newest campaign if not given.
    """
    if not database.exists():
        return None
    address = f"file:{quote(str(database))}?mode=ro"
    with contextlib.closing(sqlite3.connect(address, uri=True, timeout=5)) as store:
        try:
            rows = store.execute(_VIEWS, (EXPERIMENT, f"{VIEW}{key or '%'}", f'%"{NAME}%')).fetchall()
        except sqlite3.Error:  # a store that MLflow has not finished yet
            return None
    return _newest(rows)


def served_view(page: str, key: str | None = None) -> tuple[str, str] | None:
    """Return name and path of a campaign's view, asked of an MLflow server; None if there is none, or no answer.

    Args:
        page: the server's address.
        key: the campaign's id; the newest campaign if not given.
    """
    import httpx

    asked = f"{page}/api/2.0/mlflow/experiments/get-by-name"
    try:
        answer = httpx.get(asked, params={"experiment_name": EXPERIMENT}, timeout=5, trust_env=False).raise_for_status()
        experiment = answer.json()["experiment"]
    except (httpx.HTTPError, ValueError, KeyError):
        return None
    tags = [(tag["key"], tag["value"], experiment["experiment_id"]) for tag in experiment.get("tags", [])]
    wanted = f"{VIEW}{key or ''}"
    return _newest([tag for tag in tags if tag[0].startswith(wanted) and f'"{NAME}' in tag[1]])


def _newest(rows: list[tuple[str, str, Any]]) -> tuple[str, str] | None:
    """Name and path of the newest view of (tag, value, experiment)."""
    if not rows:
        return None
    key, value, number = max(rows, key=lambda row: int(json.loads(row[1])["createdAt"]))
    return json.loads(value)["name"], view_page(str(number), str(key).removeprefix(VIEW))


_VIEWS = """
SELECT t.key, t.value, e.experiment_id FROM experiment_tags t JOIN experiments e USING (experiment_id)
WHERE e.name = ? AND t.key LIKE ? AND t.value LIKE ?  -- people save views too
"""
