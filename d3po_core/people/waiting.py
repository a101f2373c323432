"""What a campaign waits for: the round in progress, each rater's part of it, and for whom the round still waits.

Everything here only reads, also while the page writes.
"""

import contextlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from d3po_core.people.dealing import lacking, read_split
from d3po_core.people.invitations import Invitations, read_invitations
from d3po_core.people.journal import JOURNAL_FILE, Entry, Journal, sampling_of
from d3po_core.people.questions import load_deck, waiting_round
from d3po_core.people.shares import Shares, begun
from d3po_core.people.tally import Progress, Tally
from d3po_core.store.campaign import round_config
from d3po_core.store.stages import stage_path

# A run that is well takes up a finished round sooner than this.
TAKEN_UP = timedelta(minutes=5)


@dataclass(frozen=True)
class RaterNow:
    """A person's part in the round that waits.

    Attributes:
        name: the rater.
        access: ``invited``, ``link`` (an open campaign's link), ``revoked``, or ``none`` (only imported answers).
        quota: most groups per round, None for no limit.
        dealt: groups that the split gives the rater, None without a split.
        groups: groups of which the rater has finished a question.
        answers: questions answered on the page; an answer that was taken back does not count.
        skips: questions skipped on the page that were not answered since.
        taken_back: answers and skips that the rater took back.
        left: groups that still need raters and that the rater may judge.
        last_at: time of the last entry on the page, naive UTC; None if there is none.
    """

    name: str
    access: str
    quota: int | None = None
    dealt: int | None = None
    groups: int = 0
    answers: int = 0
    skips: int = 0
    taken_back: int = 0
    left: int = 0
    last_at: datetime | None = None


@dataclass(frozen=True)
class RoundNow:
    """A round that waits for people.

    Attributes:
        round: its number.
        mode: how people judge it.
        progress: see ``tally.Progress``.
        deadline: when the run goes on without people, None if it waits as long as it takes.
        lacking: groups that lack raters even if everybody invited fills their quota; 0 if the round can end anyway.
    """

    round: int
    mode: str
    progress: Progress
    deadline: datetime | None
    lacking: int


@dataclass(frozen=True)
class CampaignNow:
    """A campaign's invitations, its raters by name, and the round that waits; None if none does."""

    campaign: str
    invitations: Invitations
    raters: tuple[RaterNow, ...]
    round: RoundNow | None


def campaign_now(campaign: Path, with_link: Iterable[str]) -> CampaignNow:
    """Look at what a campaign's people have done and what waits.

    Args:
        campaign: the campaign's folder.
        with_link: raters whose link lets them judge the campaign.

    Raises:
        D3POError: the journal, the invitations or the round cannot be read.
    """
    invitations, with_link = read_invitations(campaign), set(with_link)
    number = open_round(campaign)
    if number is None:
        names = sorted({*with_link, *invitations.raters})
        raters = [RaterNow(name, _access(name, invitations, with_link), invitations.quota(name)) for name in names]
        return CampaignNow(campaign.name, invitations, tuple(raters), None)
    with contextlib.ExitStack() as stack:
        journal = None
        if (campaign / JOURNAL_FILE).exists():
            journal = stack.enter_context(contextlib.closing(Journal(campaign, read_only=True)))
        deck = load_deck(campaign, round_config(campaign, number), number)
        entries = journal.entries(deck.sampling) if journal else []
        split = read_split(journal, deck.sampling) if journal and invitations.assignment == "split" else None
    tally = Tally(deck, entries)
    shares, progress = Shares(tally, invitations, split and split.groups), tally.progress()
    elsewhere = frozenset[str]().union(*deck.elsewhere)
    names = sorted({*with_link, *invitations.raters, *elsewhere, *(entry.rater for entry in entries)})
    raters = [
        _rater_now(name, _access(name, invitations, with_link), invitations, shares, tally, entries) for name in names
    ]
    short = lacking(tally, invitations) if invitations.closed and not progress.complete else 0
    short = short if deck.num_groups - short < progress.groups_needed else 0
    round_now = RoundNow(number, deck.mode, progress, _deadline(campaign, number), short)
    return CampaignNow(campaign.name, invitations, tuple(raters), round_now)


def open_round(campaign: Path) -> int | None:
    """The round that people can judge now, None if there is none."""
    number = waiting_round(campaign)
    if number is None or sampling_of(campaign, number) is None or stage_path(campaign, number, "label").exists():
        return None
    return None if round_config(campaign, number).judge.labeller == "proxy" else number


def waiting_line(now: CampaignNow) -> str | None:
    """A line that says what the campaign's round waits for, and for whom; None if no round waits."""
    if now.round is None:
        return None
    progress, until = (
        now.round.progress,
        f" until {now.round.deadline:%Y-%m-%d %H:%M} UTC" if now.round.deadline else "",
    )
    if progress.complete:
        return f"round {now.round.round} has the judgements it needs; {_of_its_run(now.raters)}"
    groups = f"{progress.groups_done} of {progress.groups_needed} groups judged ({progress.missing} answers missing)"
    line = f"round {now.round.round} waits for people{until}: {groups}"
    whom = [f"{rater.name} ({rater.left})" for rater in now.raters if rater.left]
    if whom:
        line += f"; may judge the rest: {', '.join(whom)}"
    if now.round.lacking or not whom:
        short = f"groups lacking raters: {now.round.lacking}" if now.round.lacking else "nobody may judge the rest"
        line += f"; {short}, so invite somebody (d3po invite NAME --campaign {now.campaign})"
    return line


def _of_its_run(raters: Iterable[RaterNow]) -> str:
    last = max((rater.last_at for rater in raters if rater.last_at), default=None)
    waited = timedelta() if last is None else datetime.now(UTC).replace(tzinfo=None) - last
    if waited < TAKEN_UP:
        return "its run goes on"
    minutes = waited.total_seconds() // 60
    return f"its run has not gone on for {minutes:.0f} minutes: Prefect's page says why (d3po status has its address)"


def _rater_now(
    name: str, access: str, invitations: Invitations, shares: Shares, tally: Tally, entries: list[Entry]
) -> RaterNow:
    own, standing = [entry for entry in entries if entry.rater == name], tally.standing(name)
    answered = {entry.question_id for entry in standing if entry.action == "answer"}
    skipped = {entry.question_id for entry in standing if entry.action == "skip"} - answered
    return RaterNow(
        name, access, invitations.quota(name), shares.dealt(name), int(begun(tally, name).sum()), len(answered),
        len(skipped), sum(entry.action == "undo" for entry in own),
        shares.left(name) if access in ("invited", "link") else 0, own[-1].judged_at if own else None,
    )  # fmt: skip


def _access(name: str, invitations: Invitations, with_link: set[str]) -> str:
    if name in invitations.raters:
        return "invited" if name in invitations.standing else "revoked"
    return "link" if name in with_link else "none"


def _deadline(campaign: Path, number: int) -> datetime | None:
    """The deadline that the waiting run noted; None if there is none, or no run waits."""
    path = stage_path(campaign, number, "waiting")
    try:
        noted = json.loads(path.read_text()).get("deadline")
        return datetime.fromisoformat(noted) if noted else None
    except (OSError, ValueError, AttributeError):  # a run is about to write it
        return None
