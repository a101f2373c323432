"""What keeps a long campaign's rounds short: nothing is told twice, and reports cost a small share of a run."""

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prefect.exceptions import Pause

from d3po.flows.commands import rounds
from d3po.tasks import reporting, showing
from d3po.tasks.tracking import delivery
from d3po.tasks.tracking.registry import versions_of
from d3po.tasks.tracking.store import forget_runs, mlflow_client, round_run_id
from d3po_core.config import CampaignConfig
from d3po_core.store.stages import finished_numbers
from tests.tasks.test_tracking_stores import registered


def told(config: CampaignConfig) -> dict[str, Any]:
    """What MLflow has of a campaign, without the ids that each store gives."""
    client = mlflow_client()
    found: dict[str, Any] = {}
    for run in client.search_runs([client.get_experiment_by_name("d3po").experiment_id]):
        files = sorted(file.path for file in client.list_artifacts(run.info.run_id))
        note = [line for line in run.data.tags["mlflow.note.content"].splitlines() if "/" not in line]
        found[run.data.tags["d3po.round"]] = (run.info.run_name, run.info.status, run.data.metrics, files, note)
    return found


def test_rounds_told_one_by_one_leave_what_one_delivery_leaves(
    own: CampaignConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = tmp_path / "later"
    for number in (2, 1):
        for table in ("rounds", "stages"):
            (held / table).mkdir(parents=True, exist_ok=True)
            shutil.move(own.folder / f"{table}/round={number}", held / f"{table}/round={number}")
    for number in (0, 1, 2):
        for table in ("rounds", "stages") if number else ():
            shutil.move(held / f"{table}/round={number}", own.folder / f"{table}/round={number}")
        delivery.deliver(own)
    one_by_one = told(own)
    assert set(one_by_one) >= {"0", "1", "2", "campaign"}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/other.db")
    forget_runs()
    delivery.deliver(own)
    at_once = told(own)
    assert at_once == one_by_one


def test_a_delivery_looks_back_to_the_last_whole_round_only(
    own: CampaignConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    delivery.deliver(own)
    looked: list[str] = []
    is_marked: Callable[..., bool] = delivery.is_marked

    def looks(path: Path, campaign_run: str) -> bool:
        looked.append(path.parent.name)
        return is_marked(path, campaign_run)

    monkeypatch.setattr(delivery, "is_marked", looks)
    delivery.deliver(own)
    assert set(looked) == {"round=2"}
    for mark in own.folder.glob("stages/round=[12]/*.delivered"):  # as after a delivery that ended with round 0
        mark.unlink()
    delivery.deliver(own)
    assert not [p for p in own.folder.glob("stages/*/evaluate.json") if not p.with_suffix(".delivered").exists()]


def test_versions_are_found_by_run_in_short_and_long_lists(
    own: CampaignConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {round_run_id(own, number): registered(own, number) for number in (1, 2)}
    first = round_run_id(own, 1)
    asked = [first, round_run_id(own, 0)]
    assert versions_of(mlflow_client(), own, asked) == {first: known[first]}, "round 0 has no checkpoint"
    monkeypatch.setattr("d3po.tasks.tracking.registry.FEW", 0)
    assert versions_of(mlflow_client(), own, asked) == known


@pytest.fixture
def written(own: CampaignConfig, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """When the report was written; writing takes a second of a clock that tests may set by ``written.clock``."""
    times: list[float] = []
    clock = [100.0]

    def write(config: CampaignConfig, mlflow: str | None) -> None:
        times.append(clock[0])
        clock[0] += 1
        (config.folder / "report.html").write_text("new")

    monkeypatch.setattr(reporting, "write_report", write)
    monkeypatch.setattr(reporting.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(reporting, "last_round_of", lambda folder, run: 99)
    monkeypatch.setattr(reporting, "_due", {})
    monkeypatch.setattr(reporting, "clock", clock, raising=False)
    return times


def test_a_report_is_rewritten_after_twenty_times_what_it_took_and_after_the_last_round(
    own: CampaignConfig, written: list[float]
) -> None:
    clock: list[float] = reporting.clock  # type: ignore[attr-defined]
    for number, now in ((1, 100.0), (2, 110.0), (3, 120.0), (4, 122.0), (5, 130.0), (99, 131.0)):
        clock[0] = now
        reporting.report_round(own, number)
    assert written == [100.0, 122.0, 131.0]


@pytest.mark.parametrize(("ends_with", "writes"), [(None, 1), (ValueError(), 1), (Pause(), 1), (SystemExit(), 0)])
def test_a_run_that_ends_or_waits_leaves_a_current_report_a_killed_one_does_not_linger(
    own: CampaignConfig, written: list[float], ends_with: BaseException | None, writes: int
) -> None:
    report = own.folder / "report.html"
    report.write_text("of an earlier round")
    os.utime(report, (0, 0))
    expected = pytest.raises(type(ends_with)) if ends_with else contextlib.nullcontext()
    with expected, reporting.current_at_the_end(own):
        if ends_with:
            raise ends_with
    assert len(written) == writes
    with reporting.current_at_the_end(own):
        pass
    assert len(written) == 1 or not writes, "a current report is not written again"


def test_tables_of_rounds_show_the_last_and_say_so(
    own: CampaignConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert finished_numbers(own.folder) == [0, 1, 2]
    assert len(showing.round_table(own)) == 3
    assert "earlier" not in showing._where(own)
    monkeypatch.setattr(showing, "ROUNDS_SHOWN", 1)
    assert [row["round"] for row in showing.round_table(own)] == ["2"]
    assert "the last 1 rounds; 2 earlier ones" in showing._where(own)
    rounds.show_campaign(own)
    assert "not shown" not in capsys.readouterr().out
    monkeypatch.setattr(rounds, "LAST_ROUNDS", 1)
    rounds.show_campaign(own)
    printed = capsys.readouterr().out
    first = {line.split("│")[1].strip() for line in printed.splitlines() if line.count("│") > 3}
    assert {"base", "2"} <= first
    assert "1" not in first
    assert "rounds 1 to 1 are not shown" in printed
