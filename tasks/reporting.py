"""The campaign's report during a run: rewritten after rounds while that is cheap, and always when the run ends."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

from prefect import get_run_logger
from prefect.exceptions import Pause
from prefect.runtime import flow_run

from d3po.tasks.showing import wait_until_shown
from d3po.tasks.tracking import delivery
from d3po_core.config import CampaignConfig
from d3po_core.report.write import REPORT_FILE, write_report
from d3po_core.store.goals import last_round_of
from d3po_core.store.stages import last_finished_round
from d3po_core.store.tables import partition

# A report of a thousand rounds takes seconds. After a report, leave it for so many times as long as it took: reports
# then cost a run a twentieth of its time at most.
PAUSE = 20
_due: dict[Path, float] = {}


def report_round(config: CampaignConfig, round_number: int) -> None:
    """Rewrite the report after a round: after the run's last one, and after others unless the last report was late."""
    is_last = round_number == last_round_of(config.folder, str(flow_run.id))
    if is_last or time.monotonic() >= _due.get(config.folder, 0.0):
        _report(config)


def catch_up(config: CampaignConfig) -> bool:
    """Rewrite the report if a round was finished after it; return whether it was."""
    last = partition(config.folder, "rounds", last_finished_round(config.folder)) / "part.parquet"
    report = config.folder / REPORT_FILE
    if not last.exists() or (report.exists() and report.stat().st_mtime >= last.stat().st_mtime):
        return False
    _report(config)
    return True


@contextlib.contextmanager
def current_at_the_end(config: CampaignConfig) -> Iterator[None]:
    """Leave report and Prefect's page current, however a run ends, also where it waits for people; not if killed."""
    try:
        yield
    except (Exception, Pause):
        _end(config)
        raise
    _end(config)


def _end(config: CampaignConfig) -> None:
    if catch_up(config):
        delivery.deliver_report(config)
    wait_until_shown()


def _report(config: CampaignConfig) -> None:
    """Rewrite the campaign's report; a failure never fails the round."""
    started = time.monotonic()
    try:
        write_report(config, mlflow=delivery.pages(config).get(delivery.ROUNDS))
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        get_run_logger().warning("the report was not written (%s); to try again: d3po report", reason)
    now = time.monotonic()
    _due[config.folder] = now + PAUSE * (now - started)
