"""What Prefect's page is shown, without a server."""

import logging
import re
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from prefect.events.schemas.automations import AutomationCore, EventTrigger
from prefect.events.schemas.events import Resource

from d3po.tasks import showing
from d3po.tasks.announcing import PEOPLE_NEEDED
from d3po_core.config import CampaignConfig
from d3po_core.paths import PROJECT_ROOT
from d3po_core.store.stages import finished_rounds

AUTOMATIONS = yaml.safe_load((PROJECT_ROOT / "docs" / "automation.yaml").read_text())["automations"]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Percentages that Prefect was told; calls are made at once, and the clock moves by 4 s a look."""
    percents: list[float] = []
    clock = iter(range(0, 10_000, 4))
    monkeypatch.setattr(showing.time, "monotonic", lambda: next(clock))

    def at_once(what: str, call: Callable[[], None]) -> Future[None]:
        showing._try(what, call)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    monkeypatch.setattr(showing, "beside", at_once)
    monkeypatch.setattr(showing, "create_progress_artifact", lambda p, **_: percents.append(p) or "id")
    monkeypatch.setattr(showing, "update_progress_artifact", lambda _, p, **__: percents.append(p))
    return percents


@given(st.text(max_size=30), st.sampled_from(["rounds", "train"]))
def test_artifact_keys_have_only_what_prefect_allows(campaign: str, what: str) -> None:
    assert re.fullmatch(r"d3po(-[a-z0-9]+)*", showing.artifact_key(campaign, what))
    assert showing.artifact_key("Night_2.b", "rounds") == "d3po-night-2-b-rounds"


def test_nothing_is_told_of_a_stage_that_is_over_soon(told: list[float]) -> None:
    progress = showing.StageProgress()
    progress.tell(0.5, str)
    progress.end(str)
    assert told == []


def test_progress_is_told_now_and_then_and_ends_at_100(told: list[float]) -> None:
    progress = showing.StageProgress()
    for step in range(1, 10):
        progress.tell(step / 10, str)
    progress.end(str)
    assert told == [20, 50, 80, 100]  # looked at every 4 s: after 5 s, then after 10 s each


def test_a_server_that_hangs_keeps_nobody_waiting(told: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    answer = threading.Event()
    monkeypatch.setattr(showing, "beside", lambda what, call: showing._beside.submit(answer.wait))
    progress = showing.StageProgress()
    for step in range(1, 10):
        progress.tell(step / 10, str)
    assert showing._beside._work_queue.qsize() == 0, "calls pile up behind one that is not answered"
    answer.set()


def test_a_prefect_that_fails_is_one_warning_and_no_error(
    told: list[float], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise ConnectionError("no\nserver")

    monkeypatch.setattr(showing, "create_progress_artifact", fails)
    monkeypatch.setattr(showing, "_failing", set())
    progress = showing.StageProgress()
    with caplog.at_level(logging.WARNING, logger="d3po.tasks.showing"):
        for step in range(1, 10):
            progress.tell(step / 10, str)
        progress.end(str)
    assert [record.message for record in caplog.records] == [
        "Prefect's page does not show the progress (no server); the run goes on"
    ]


def test_rounds_are_rows_with_the_latest_first(campaign: Path) -> None:
    config = CampaignConfig(campaign="tiny", runs_dir=str(campaign.parent))
    rows = showing.round_table(config)
    assert [row["round"] for row in rows] == ["2", "1", "base"]
    last = finished_rounds(campaign)[-1]
    assert rows[0]["held-out brightness [95 %]"] == f"{last.score.mean:.3f} [too few to tell]"  # three prompts
    assert rows[0]["train s"] == "1.0"


def test_event_of_a_round_has_one_id_whoever_sends_it(campaign: Path) -> None:
    config = CampaignConfig(campaign="tiny", runs_dir=str(campaign.parent))
    first, *_, last = finished_rounds(campaign)
    event = showing.round_event(config, last)
    assert event["id"] == showing.round_event(config, last)["id"] != showing.round_event(config, first)["id"]
    assert event["payload"]["held_out"] == {"scorer": "brightness", **last.score.model_dump()}
    assert event["payload"]["checkpoint"] == str(campaign / "checkpoints/round=2")
    assert event["occurred"].tzinfo is not None


ON_ROUNDS = [one for one in AUTOMATIONS if one["trigger"]["expect"] == [showing.EVENT]]


@pytest.mark.parametrize("automation", AUTOMATIONS, ids=lambda automation: automation["name"])
def test_example_automations_wait_for_events_that_are_sent(automation: dict[str, Any]) -> None:
    parsed = AutomationCore.model_validate(automation)
    assert isinstance(parsed.trigger, EventTrigger)
    assert parsed.trigger.expect <= {showing.EVENT, PEOPLE_NEEDED}


@pytest.mark.parametrize("automation", ON_ROUNDS, ids=lambda automation: automation["name"])
def test_example_automations_are_what_prefect_takes_and_match_the_event(
    automation: dict[str, Any], campaign: Path
) -> None:
    parsed = AutomationCore.model_validate(automation)
    assert isinstance(parsed.trigger, EventTrigger)
    config = CampaignConfig(campaign="tiny", runs_dir=str(campaign.parent))
    event = showing.round_event(config, finished_rounds(campaign)[-1])
    labels = {**event["resource"], "d3po.verdict": "rejected"}
    name = automation["trigger"]["match"]["prefect.resource.id"]
    assert parsed.trigger.match.matches(Resource(labels)) == (name == "d3po.campaign.*")
    assert not parsed.trigger.match.matches(Resource({**labels, "d3po.verdict": "ok"}))
