"""Tell people that a round waits for them: in the log, as an artifact, as an event, and in the run's state."""

import contextlib
import os
from datetime import UTC, datetime
from functools import partial
from typing import Any
from uuid import NAMESPACE_URL, uuid5

from prefect import get_run_logger
from prefect.artifacts import create_markdown_artifact
from prefect.events import emit_event
from prefect.events.worker import EventsWorker

from d3po.tasks.showing import artifact_key, beside
from d3po_core.config import CampaignConfig
from d3po_core.errors import D3POError
from d3po_core.page.access import Raters
from d3po_core.paths import data_folder
from d3po_core.people.tally import Progress
from d3po_core.store.campaign import campaign_id

PEOPLE_NEEDED = "d3po.people.needed"
MOST_NAMES = 3
DEFAULT_PAGE = "http://127.0.0.1:8700"


def announce(config: CampaignConfig, round_number: int, waiting: dict[str, Any], progress: Progress) -> str:
    """Tell what the run waits for and where to judge; return the line for the run's state.

    Args:
        config: of the campaign.
        round_number: the round.
        waiting: the wait's record: ``since``, ``deadline``, ``attempt``.
        progress: people's, with this round.
    """
    said = waits_for(round_number, waiting["deadline"], progress)
    get_run_logger().info(said)
    create_markdown_artifact(_page(config, round_number, said), key=artifact_key(config.campaign, "label"),
                             description=said)  # fmt: skip
    if waiting["attempt"] == 0:  # a run that was woken too early is no news
        beside("people needed", partial(_send, people_event(config, round_number, waiting, progress)))
    return said


def waits_for(round_number: int, deadline: str | None, progress: Progress) -> str:
    """One line: who, where, what is missing, until when; in this order, because Prefect's page cuts the end off."""
    names = raters()
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    who = ", ".join(names[:MOST_NAMES]) + more or "people"
    until = f" until {deadline[:16]} UTC" if deadline else ""
    hint = "" if names else "; nobody has a link yet, type: d3po label --rater NAME"
    return f"round {round_number} waits for {who} at {page_url()}: {missing(progress)} to judge{until}{hint}"


def missing(progress: Progress) -> str:
    """How many groups are left to judge: ``3 of 24 groups``."""
    return f"{progress.groups_needed - progress.groups_done} of {progress.groups_needed} groups"


def raters() -> list[str]:
    """Names of the people who have a link to the page; none if their file cannot be read."""
    with contextlib.suppress(D3POError):
        return Raters(data_folder()).names()
    return []


def page_url() -> str:
    """Address of the labelling page: ``D3PO_LABEL_URL``, or the one that ``d3po up`` uses."""
    return os.environ.get("D3PO_LABEL_URL") or DEFAULT_PAGE


def people_event(
    config: CampaignConfig, round_number: int, waiting: dict[str, Any], progress: Progress
) -> dict[str, Any]:
    """The event of a round that begins to wait; its id follows from campaign, round and start of the wait."""
    identity = f"{PEOPLE_NEEDED}/{campaign_id(config.folder)}/{round_number}/{waiting['since']}"
    return {
        "event": PEOPLE_NEEDED,
        "id": uuid5(NAMESPACE_URL, identity),
        "occurred": datetime.now(UTC),
        "resource": {
            "prefect.resource.id": f"d3po.campaign.{config.campaign}", "prefect.resource.name": config.campaign,
            "d3po.round": str(round_number),
        },
        "payload": {
            "campaign": config.campaign, "round": round_number, "raters": raters(), "page": page_url(),
            "groups_missing": progress.groups_needed - progress.groups_done, "groups_needed": progress.groups_needed,
            "deadline": waiting["deadline"], "guideline": config.judge.people.guideline,
        },
    }  # fmt: skip


def _send(event: dict[str, Any]) -> None:
    emit_event(**event)
    EventsWorker.instance().wait_until_empty()  # the process is about to end


def _page(config: CampaignConfig, round_number: int, said: str) -> str:
    return (
        f"# Round {round_number} of `{config.campaign}` waits for people\n\n"
        f"**[Open the labelling page]({page_url()})**: {said}.\n\n"
        f"Or by spreadsheet: `d3po export-sheet FOLDER --campaign {config.campaign}`, then "
        f"`d3po import FILE --campaign {config.campaign} --resume`.\n\n"
        "The run goes on after the last judgement. To go on earlier, press *Resume* on this run.\n"
    )
