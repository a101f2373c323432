"""Deliver results to MLflow: one parent run per campaign, one child run per round. No decision reads from it.

Everything comes from what stages left on disk, so it can be sent at any later time: ``deliver`` sends all that is not
delivered yet. A server that is down costs a warning, never a round. Delivering twice changes nothing.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from d3po.tasks.logs import run_logger
from d3po.tasks.tracking.marks import has_old_marks, is_marked, mark, mark_path, name_old_marks, note_told, told
from d3po.tasks.tracking.stages import LOGGERS, log_human_win_rate
from d3po.tasks.tracking.store import (
    Client,
    campaign_page,
    campaign_run_id,
    existing_campaign_run,
    forget_runs,
    log_report,
    mlflow_client,
    round_run_id,
    run_page,
    tracking_uri,
)
from d3po.tasks.tracking.texts import tell_texts
from d3po_core.config import CampaignConfig
from d3po_core.errors import D3POError
from d3po_core.people.blind import collect_comparisons, comparison_path, comparisons_of
from d3po_core.people.human_win_rate import HumanWinRate, human_win_rates
from d3po_core.report.write import REPORT_FILE
from d3po_core.store.campaign import round_config
from d3po_core.store.stages import begun_numbers, finished_numbers, stage_path
from d3po_core.store.tables import partition
from d3po_core.urls import masked

STAGES = tuple(LOGGERS)
ROUNDS = "rounds in MLflow"

# After a failure, back off for PAUSE times as long as the failed call took. So a store that does not answer costs a run
# a tenth of its time at most.
PAUSE = 10
_left_alone_until: dict[str, float] = {}

logger = logging.getLogger(__name__)


def deliver(config: CampaignConfig) -> None:
    """Send MLflow every finished stage and every blind comparison that it does not have yet; update names and texts."""
    _deliver_stages(config)
    deliver_comparisons(config)


def deliver_comparisons(config: CampaignConfig) -> None:
    """Send MLflow how often people prefer a round, seen blind, and texts that changed, unless it has been told already.

    It covers only rounds that are otherwise delivered. It may run while another process advances the campaign, and only
    one of the two may create the round's run.
    """
    try:
        rates = _rates(config.folder)
    except D3POError as error:
        logger.warning("blind comparisons of campaign %r: %s", config.campaign, error)
        return
    if _is_left_alone() or not finished_numbers(config.folder):
        return
    try:
        with _patience():
            client, campaign_run = mlflow_client(), _existing_run(config)
            if campaign_run:
                for rate in rates:
                    _deliver_rate(client, config, campaign_run, rate)
                tell_texts(client, config, campaign_run, rates)
    except Exception as error:
        _warn(f"names, descriptions and {len(rates)} blind comparisons", error)


def deliver_report(config: CampaignConfig) -> None:
    """Send MLflow the report as it is now, if MLflow knows the campaign."""
    report = config.folder / REPORT_FILE
    if _is_left_alone() or not report.exists():
        return
    try:
        with _patience():
            client = mlflow_client()
            if existing_campaign_run(config):
                log_report(client, config, report)
    except Exception as error:
        _warn("the report", error)


def _deliver_rate(client: Client, config: CampaignConfig, campaign_run: str, rate: HumanWinRate) -> None:
    path, what = _told_path(config.folder, rate), rate.model_dump_json()
    published = is_marked(mark_path(config.folder, rate.round, "publish"), campaign_run)
    if published and told(path, campaign_run) != what:
        config_then = _config_of(config, rate.round)
        log_human_win_rate(client, config_then, rate, round_run_id(config_then, rate.round))
        note_told(path, campaign_run, what)


def _rates(campaign: Path) -> list[HumanWinRate]:
    if not comparisons_of(campaign):
        return []
    collect_comparisons(campaign)
    return list(human_win_rates(campaign))


def _told_path(campaign: Path, rate: HumanWinRate) -> Path:
    return comparison_path(campaign, rate.round, rate.against).with_suffix(".delivered")


def _deliver_stages(config: CampaignConfig) -> None:
    folder = config.folder  # looked up once: each lookup costs, and this looks at many files
    if _is_left_alone() or not any(_finished(folder, number) for number in begun_numbers(folder)):
        return
    waiting = _waiting(folder, Path.exists)
    try:
        with _patience():
            client = mlflow_client()
            campaign_run = _existing_run(config) or campaign_run_id(config)
            waiting = _waiting(folder, partial(is_marked, campaign_run=campaign_run))
            for round_number, order in waiting:
                # The round's own configuration may differ from this run's.
                config_then = _config_of(config, round_number)
                run_id = round_run_id(config_then, round_number)
                LOGGERS[STAGES[order]](client, config_then, round_number, run_id)
                mark(mark_path(folder, round_number, STAGES[order]), campaign_run)
    except Exception as error:
        _warn(f"{len(waiting)} finished stages", error)


def _existing_run(config: CampaignConfig) -> str | None:
    """The campaign's run, if the store knows it.

    Marks of an earlier version then count for this store, else for another one.
    """
    found = existing_campaign_run(config)
    if has_old_marks(config.folder):
        name_old_marks(config.folder, found)
    return found


def _warn(what: str, error: Exception) -> None:
    """Warn that MLflow failed; no failure there is worth a round."""
    run_logger().warning(
        "MLflow at %s did not take %s (%s); they are kept and delivered with the next one",
        masked(tracking_uri()), what, masked(" ".join(str(error).split()))[:200],
    )  # fmt: skip


def _is_left_alone() -> bool:
    return time.monotonic() < _left_alone_until.get(tracking_uri(), 0.0)


@contextlib.contextmanager
def _patience() -> Iterator[None]:
    """Call MLflow in this context; after a failure, back off for ``PAUSE`` times as long as the call took."""
    started = time.monotonic()
    try:
        yield
    except Exception:
        forget_runs()  # somebody may have deleted one
        now = time.monotonic()
        _left_alone_until[tracking_uri()] = now + PAUSE * (now - started)
        raise


def _config_of(config: CampaignConfig, round_number: int) -> CampaignConfig:
    """The configuration that a round began with; ``runs_dir`` as the run gave it, because MLflow shows it."""
    if not stage_path(config.folder, round_number, "config").exists():
        return config
    return round_config(config.folder, round_number).model_copy(update={"runs_dir": config.runs_dir})


def known_run_id(config: CampaignConfig, round_number: int) -> str | None:
    """The child run of a round, None if MLflow cannot be reached."""
    return _asked(partial(round_run_id, config, round_number))


def pages(config: CampaignConfig) -> dict[str, str]:
    """Addresses of the campaign's rounds, curves and report in MLflow; none if MLflow has no page."""
    parts = {"curves in MLflow": "model-metrics", "report": "artifacts/report.html"}
    asked = {ROUNDS: partial(campaign_page, config)}
    asked |= {name: partial(run_page, config, part) for name, part in parts.items()}
    return {name: page for name, question in asked.items() if (page := _asked(question))}


def _asked(question: Callable[[], str | None]) -> str | None:
    """MLflow's answer, None if there is none."""
    if _is_left_alone():
        return None
    try:
        with _patience():
            return question()
    except Exception:
        return None


def _waiting(campaign: Path, is_marked: Callable[[Path], bool]) -> list[tuple[int, int]]:
    """Round and order of every finished stage without a mark, in order.

    Stages are delivered in order. So nothing waits before a round that is published and all marked.
    """
    waiting: list[tuple[int, int]] = []
    for number in reversed(begun_numbers(campaign)):
        orders = _finished(campaign, number)
        unmarked = [order for order in orders if not is_marked(mark_path(campaign, number, STAGES[order]))]
        waiting = [(number, order) for order in unmarked] + waiting
        if not unmarked and STAGES.index("publish") in orders:
            break
    return waiting


def _finished(campaign: Path, round_number: int) -> list[int]:
    """Orders of a round's finished stages that MLflow should know."""
    done = {path.stem for path in stage_path(campaign, round_number, "any").parent.glob("*.json")}
    if (partition(campaign, "rounds", round_number) / "part.parquet").exists():
        done.add("publish")
    return [order for order, stage in enumerate(STAGES) if stage in done]
