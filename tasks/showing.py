"""Show a run on Prefect's page: progress of long stages, a table of the rounds, one event per finished round.

One thread does all this beside the stages, in order: a slow or missing Prefect server costs a warning and no time.
Only the event is tracked: a file beside the round's records notes that Prefect was told. If a run is killed before
that, the campaign's next run sends the event again. So it is sent at least once; its id follows from campaign and
round, so the server keeps it once.
"""

import logging
import re
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextvars import copy_context
from datetime import UTC
from functools import partial
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_URL, UUID, uuid5

from prefect.artifacts import create_progress_artifact, create_table_artifact, update_progress_artifact
from prefect.context import FlowRunContext, TaskRunContext
from prefect.events import emit_event
from prefect.events.worker import EventsWorker

from d3po.tasks.tracking import delivery
from d3po_core.config import CampaignConfig
from d3po_core.records import GuardRecord, RoundRecord, ScoreSummary
from d3po_core.report.write import REPORT_FILE
from d3po_core.store.campaign import campaign_id
from d3po_core.store.stages import finished_numbers, finished_round, read_record, stage_path

EVENT = "d3po.round.completed"
# A shorter stage ends before anybody looks; a call takes a busy server some 50 ms.
FIRST_SECONDS, EVERY_SECONDS = 5.0, 10.0
# Rounds in Prefect's table, which gets a whole new one per round.
ROUNDS_SHOWN = 50
LAST_SECONDS = 10.0  # the end of a run waits so long for what is still being shown

logger = logging.getLogger(__name__)
_beside = ThreadPoolExecutor(1, thread_name_prefix="show")
_failing: set[str] = set()


def artifact_key(campaign: str, what: str) -> str:
    """Key of an artifact in Prefect, which allows only lowercase letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", f"d3po-{campaign}-{what}".lower()).strip("-")


class StageProgress:
    """A stage's progress as an artifact of its run: created if the stage takes long, then updated at times.

    It has no key, so that Prefect shows it with its run but not in the list of all artifacts. There, one entry per
    campaign and stage would bury the tables of rounds.
    """

    def __init__(self) -> None:
        self._due = time.monotonic() + FIRST_SECONDS
        self._artifact: UUID | None = None
        self._telling: Future[None] | None = None

    def tell(self, share: float, text: Callable[[], str]) -> None:
        """Report the share done, 0 to 1, with a text; most calls do nothing."""
        now = time.monotonic()
        if now >= self._due and (self._telling is None or self._telling.done()):
            self._due = now + EVERY_SECONDS
            self._telling = beside("progress", partial(self._send, 100 * min(share, 1.0), text()))

    def end(self, text: Callable[[], str]) -> None:
        """Report that all is done, if anything was reported before."""
        if self._telling is not None:
            beside("progress", partial(self._send, 100.0, text()))

    def _send(self, percent: float, text: str) -> None:
        if self._artifact is None:
            self._artifact = create_progress_artifact(percent, description=text)
        else:
            update_progress_artifact(self._artifact, percent, description=text)


def show_rounds(config: CampaignConfig) -> None:
    """Tell Prefect of every finished round of the campaign, unless it has been told already."""
    # From the latest: a new round is found at once.
    if any(not _told_path(config.folder, number).exists() for number in reversed(finished_numbers(config.folder))):
        beside("rounds", partial(_tell_rounds, config))


def round_event(config: CampaignConfig, record: RoundRecord) -> dict[str, Any]:
    """The event of a finished round; automations can match the labels of its resource, not its payload."""
    guard = _guard_record(config.folder, record.round)
    assert record.finished_at is not None
    return {
        "event": EVENT,
        "id": uuid5(NAMESPACE_URL, f"{EVENT}/{campaign_id(config.folder)}/{record.round}"),
        "occurred": record.finished_at.replace(tzinfo=UTC),
        "resource": {
            "prefect.resource.id": f"d3po.campaign.{config.campaign}", "prefect.resource.name": config.campaign,
            "d3po.round": str(record.round), "d3po.verdict": record.verdict or "unknown",
        },
        "payload": {
            "campaign": config.campaign, "round": record.round, "verdict": record.verdict, "findings": record.findings,
            "held_out": {"scorer": record.eval_scorer, **record.score.model_dump()},
            "win_rates": {name: rate.model_dump() for name, rate in guard.win_rates.items()} if guard else {},
            "pairs": record.num_pairs, "ties": record.num_ties, "seconds": record.stage_seconds,
            "checkpoint": record.checkpoint and str(config.folder / record.checkpoint),
            "champion": guard and guard.champion, "mlflow_run_id": record.mlflow_run_id,
        },
    }  # fmt: skip


def round_table(config: CampaignConfig) -> list[dict[str, str]]:
    """The campaign's last finished rounds as table rows, the latest first, at most ``ROUNDS_SHOWN``."""

    def shown(score: ScoreSummary | None) -> str:
        return str(score) if score else ""

    rows = []
    for number in reversed(finished_numbers(config.folder)[-ROUNDS_SHOWN:]):
        record = finished_round(config.folder, number)
        guard = _guard_record(config.folder, record.round)
        rates = guard.win_rates if guard else {}
        rows.append(
            {
                "round": str(record.round) if record.round else "base",
                f"held-out {record.eval_scorer} [95 %]": shown(record.score),
                "wins against base": shown(rates.get("base")), "against the round before": shown(rates.get("before")),
                "guard": f"{record.verdict}: {record.findings}" if record.findings else record.verdict or "",
                "pairs": str(record.num_pairs), "ties": str(record.num_ties),
                **{f"{stage} s": f"{seconds:.1f}" for stage, seconds in record.stage_seconds.items()},
            }
        )  # fmt: skip
    return rows


def _tell_rounds(config: CampaignConfig) -> None:
    untold = [n for n in finished_numbers(config.folder) if not _told_path(config.folder, n).exists()]
    if not untold:
        return
    for number in untold:
        emit_event(**round_event(config, finished_round(config.folder, number)))
    EventsWorker.instance().wait_until_empty()
    for number in untold:
        _told_path(config.folder, number).touch()
    create_table_artifact(round_table(config), key=artifact_key(config.campaign, "rounds"), description=_where(config))


def _where(config: CampaignConfig) -> str:
    """The report's path, links to it and the curves if MLflow has a page, and how many rounds the table leaves out."""
    links = [f"[{what}]({url})" for what, url in delivery.pages(config).items()]
    if (earlier := len(finished_numbers(config.folder)) - ROUNDS_SHOWN) > 0:
        links.insert(0, f"the last {ROUNDS_SHOWN} rounds; {earlier} earlier ones are in MLflow and in the report")
    return " · ".join([*links, f"report: `{config.folder / REPORT_FILE}`"])


def _guard_record(campaign: Path, round_number: int) -> GuardRecord | None:
    if not stage_path(campaign, round_number, "guard").exists():  # finished before the guard existed
        return None
    return read_record(campaign, round_number, "guard", GuardRecord)


def _told_path(campaign: Path, round_number: int) -> Path:
    return stage_path(campaign, round_number, "event").with_suffix(".told")


def beside(what: str, call: Callable[[], None]) -> Future[None] | None:
    """Make a call beside the run, in the run's context; outside a run, do nothing."""
    if FlowRunContext.get() is None and TaskRunContext.get() is None:
        return None
    return _beside.submit(copy_context().run, _try, what, call)


def wait_until_shown() -> None:
    """Wait a little for what is still being shown: when its run has ended, Prefect's client takes no more calls."""
    wait([_beside.submit(int)], LAST_SECONDS)


def _try(what: str, call: Callable[[], None]) -> None:
    try:
        call()
        _failing.discard(what)
    except Exception as error:  # no failure here is worth a round
        if what not in _failing:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            logger.warning("Prefect's page does not show the %s (%s); the run goes on", what, reason)
        _failing.add(what)
