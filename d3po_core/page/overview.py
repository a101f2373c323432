"""What the owner's page shows of a campaign: people's progress, and how well they agree."""

import threading
import time
from dataclasses import dataclass
from pathlib import Path

from d3po_core.page.access import Raters
from d3po_core.page.desk import described
from d3po_core.people.invitations import read_invitations
from d3po_core.people.raters import RaterReport, RaterSummary, connect_with_journal, rater_report
from d3po_core.people.reports import ImageReports
from d3po_core.people.waiting import CampaignNow, campaign_now, waiting_line
from d3po_core.store.campaign import rules_of

# Agreement reads every vote of the campaign, so compute it at most this often.
REPORT_SECONDS = 5.0


@dataclass(frozen=True)
class Overview:
    """A campaign for its owner.

    Attributes:
        now: progress and raters.
        report: agreement in the round that waits, or else in all rounds; None until it is computed.
        problem: why agreement cannot be computed, None if it can.
        reported: by image, each rater's reason for reporting it.
    """

    now: CampaignNow
    report: RaterReport | None
    problem: str | None
    reported: dict[str, dict[str, str]]

    @property
    def summaries(self) -> dict[str, RaterSummary]:
        """The report's raters by name."""
        return {one.rater: one for one in self.report.raters} if self.report else {}


@dataclass
class _Known:
    """A campaign's last report, the state it was made from, and when."""

    stamp: CampaignNow | None = None
    made: float | None = None
    report: RaterReport | None = None
    problem: str | None = None
    under_way: bool = False


class Overviews:
    """Overviews of campaigns; threads may share them.

    Args:
        raters: who has links.
    """

    def __init__(self, raters: Raters) -> None:
        self._raters, self._lock = raters, threading.Lock()
        self._known: dict[Path, _Known] = {}

    def of(self, campaign: Path) -> Overview:
        """A campaign's overview, read from its files; agreement may be some seconds old.

        Raises:
            D3POError: they cannot be read.
        """
        now = self._now(campaign)
        with self._lock:
            known = self._known.setdefault(campaign, _Known())
            old = known.made is None or time.monotonic() - known.made >= REPORT_SECONDS
            if known.stamp != now and old and not known.under_way:
                known.under_way = True
                threading.Thread(target=self._compute, args=(campaign, now, known), daemon=True).start()
            return Overview(now, known.report, known.problem, ImageReports(campaign).standing())

    def line(self, campaign: Path) -> tuple[str | None, str | None]:
        """A line on what a campaign waits for, and the error if that is unknown; either may be None."""
        try:
            return waiting_line(self._now(campaign)), None
        except Exception as error:  # the other campaigns are shown all the same
            return None, described(error)

    def _now(self, campaign: Path) -> CampaignNow:
        return campaign_now(campaign, self._raters.admitted(campaign))

    def _compute(self, campaign: Path, now: CampaignNow, known: "_Known") -> None:
        """Compute agreement in the background, so that progress never waits for it."""
        report, problem, number = known.report, None, now.round.round if now.round else None
        try:
            floor = rules_of(campaign, number).judge.people.accuracy_floor
            with connect_with_journal(campaign) as connection:
                report = rater_report(connection, floor, number)
        except Exception as error:  # show it, and try again later
            problem = described(error)
        with self._lock:
            known.stamp, known.made, known.under_way = None if problem else now, time.monotonic(), False
            known.report, known.problem = report, problem


def invitation_text(rater: str, campaign: Path, link: str) -> str:
    """A text that invites a rater, to paste into a message."""
    quota = read_invitations(campaign).quota(rater)
    amount = f"Please judge up to {quota} groups of images per round. " if quota else ""
    return (
        f"Hello {rater},\n\n"
        f"please help us to judge images of the campaign {campaign.name}. Open this link; it works in a browser on a "
        f"computer or a phone:\n\n{link}\n\n"
        f"{amount}Each answer is saved at once, so you can stop and come back whenever you like. The link is yours "
        "alone: please do not pass it on.\n"
    )
