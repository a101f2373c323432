"""Rounds that the guard warns of: what their rows say, and what a real Prefect server keeps of them."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from mlflow import MlflowClient

from d3po_core.paths import PROJECT_ROOT
from d3po_core.store.stages import finished_rounds, stage_path
from d3po_core.store.tables import partition, read_rows
from tests.flows.test_guard import SMALL, row_of
from tests.flows.test_servers import eventually

NAME = "Shown_1"


@pytest.fixture(scope="module")
def ask(prefect_server: dict[str, str]) -> Callable[[str, dict[str, Any]], Any]:
    """Ask the server."""

    def post(path: str, body: dict[str, Any]) -> Any:
        url = f"{prefect_server['PREFECT_API_URL']}{path}"
        return httpx.post(url, json=body, timeout=30, trust_env=False).raise_for_status().json()

    return post


def events(ask: Callable[..., Any], name: str, resource: str) -> list[dict[str, Any]]:
    found = ask("/events/filter", {"filter": {"event": {"name": [name]}, "any_resource": {"id": [resource]}}})
    return sorted(found["events"], key=lambda event: event["occurred"])


@pytest.fixture(scope="module")
def campaign(run_rounds: Callable[..., int], data: Path, prefect_server: dict[str, str]) -> Path:
    """Two rounds that the guard does not trust, with the automations of the docs; one was told of twice."""
    subprocess.run(
        [sys.executable, "-m", "prefect", "automation", "create", "--from-file", PROJECT_ROOT / "docs/automation.yaml"],
        check=True, capture_output=True,
    )  # fmt: skip
    values = {**SMALL, "campaign": NAME, "guard": {"policy": "warn", "max_drift": 1e-12}}
    folder = data / "runs" / NAME
    assert run_rounds(values, 1) == 0
    stage_path(folder, 1, "event").with_suffix(".told").unlink()  # as a run leaves it that is killed before it is told
    assert run_rounds(values, 1) == 0
    return folder


def test_each_finished_round_is_one_event_also_when_it_is_sent_again(campaign: Path, ask: Callable[..., Any]) -> None:
    found = eventually(lambda: len(f := events(ask, "d3po.round.completed", f"d3po.campaign.{NAME}")) >= 3 and f)
    assert [event["payload"]["round"] for event in found] == [0, 1, 2]
    assert [event["resource"]["d3po.verdict"] for event in found] == ["ok", "warned", "warned"]
    last = found[-1]["payload"]
    assert last["win_rates"].keys() == {"base", "before", "champion"}
    assert "drift" in last["findings"]
    assert Path(last["checkpoint"]).is_dir()
    assert {"sample", "train", "evaluate"} <= last["seconds"].keys()


def test_warned_round_is_built_upon(campaign: Path) -> None:
    assert [record.verdict for record in finished_rounds(campaign)] == ["ok", "warned", "warned"]
    assert row_of(campaign, 2)["checkpoint_in"] == "checkpoints/round=1"


def test_rounds_say_how_they_compare(campaign: Path) -> None:
    row = row_of(campaign, 1)
    assert 0 <= row["win_rate_base"] <= 1
    assert row["win_rate_base"] == row["win_rate_before"] == row["win_rate_champion"]  # all are the base
    assert row["win_rate_base_low"] <= row["win_rate_base"] <= row["win_rate_base_high"]
    assert row["drift"] > 0
    assert 0 < row["diversity"] < 1
    scorers = {r["scorer"] for r in read_rows(partition(campaign, "evaluations", 1) / "part.parquet")}
    assert scorers == {"prompt_alignment", "brightness"}


def test_example_automation_reacts_to_rounds_that_the_guard_does_not_trust(
    campaign: Path, ask: Callable[..., Any]
) -> None:
    body = {"filter": {"event": {"name": ["prefect.automation.triggered"]}}}
    fired = eventually(lambda: len(f := ask("/events/filter", body)["events"]) >= 2 and f)
    assert all("guard does not trust" in event["resource"]["prefect.resource.name"] for event in fired)


def test_rounds_are_a_table_whose_versions_have_one_key(campaign: Path, ask: Callable[..., Any]) -> None:
    body = {"artifacts": {"key": {"any_": ["d3po-shown-1-rounds"]}}}
    tables = eventually(lambda: len(f := ask("/artifacts/filter", body)) >= 3 and f)
    assert str(campaign / "report.html") in tables[0]["description"]
    assert {table["type"] for table in tables} == {"table"}


def test_mlflow_has_the_report_of_the_last_round(campaign: Path, data: Path) -> None:
    client = MlflowClient(f"sqlite:///{data}/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("d3po")
    chosen = f"tags.`d3po.campaign` = '{NAME}' and tags.`d3po.round` = 'campaign'"
    (parent,) = client.search_runs([experiment.experiment_id], chosen)
    assert parent.data.tags["d3po.report"] == str(campaign / "report.html")
    stored = client.download_artifacts(parent.info.run_id, "report.html")
    assert Path(stored).read_bytes() == (campaign / "report.html").read_bytes()
