"""One campaign on the labelling page: choose what a rater sees next, and store what the rater answers."""

import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np

from d3po_core.config import CampaignConfig
from d3po_core.errors import D3POError
from d3po_core.page.completion import Completion, OnComplete
from d3po_core.page.queue import Queue, shown_order
from d3po_core.page.view import View
from d3po_core.people.dealing import agreed_split
from d3po_core.people.invitations import OPEN, Invitations, read_invitations
from d3po_core.people.journal import FILE_PREFIX, Journal, Submission, sampling_of
from d3po_core.people.questions import load_deck, waiting_round
from d3po_core.people.reports import ImageReports, Reason
from d3po_core.people.shares import Shares
from d3po_core.people.tally import SKIPPED, Deck, Question, Tally, answer_problem
from d3po_core.store.campaign import round_config
from d3po_core.store.tables import partition
from d3po_core.ways import WAYS

# Minimum time between two looks at the round's state on disk.
LOOK_SECONDS = 0.5
PRIORITY_SECONDS = 10.0
RATE_ANSWERS = 20
GONE = "the images that were judged are gone: the round was dropped or sampled again; reload the page"
# Round, sampling, attempt, question; all numbers fit into a path and the journal.
TICKET = re.compile(r"([0-9]{1,9})\.([0-9a-f]{1,64})\.([0-9]{1,9})\.([a-z_]{1,16}:[\x21-\x7e]{1,300})")
Priority = Callable[[CampaignConfig, int, Sequence[tuple[str, ...]]], np.ndarray]


class GoneError(D3POError):
    """The judged question is not asked any more, and the answer cannot be stored."""


class UnfitError(D3POError):
    """An answer does not fit its question; sending it again does not help."""


class Desk:
    """A campaign's journal and the round that waits for people; threads may share it.

    A subclass with another deck serves other things to judge (``comparing.ComparisonDesk``).

    Args:
        campaign: the campaign's folder.
        on_complete: called in the background with (campaign's name, round number) when a round has enough.
        priority: gets the round's configuration, its number and the sample ids of each question, and returns [Q]
            numbers; questions with high ones come first. Without it the order is random.
        mode: how people judge, in place of the configuration's.
        retry_seconds: pause after ``on_complete`` raised.
        grace_seconds: how long after its last answer a complete round is used, so that it can be taken back.
    """

    blind, title = False, ""
    # If true, a complete deck is used, and then nothing can be taken back any more.
    final = True

    def __init__(
        self, campaign: Path, on_complete: OnComplete, priority: Priority | None = None, mode: str | None = None,
        retry_seconds: float = 10.0, grace_seconds: float = 0.0,
    ) -> None:  # fmt: skip
        self.campaign, self._grace = campaign, grace_seconds
        self._reports = ImageReports(campaign)
        self._priority, self._mode = priority, mode
        self._completion = Completion(campaign, on_complete, retry_seconds)
        self._lock = threading.RLock()
        self._journal: Journal | None = None
        self._deck: Deck | None = None
        self._stamp: object = None
        self._looked = 0.0
        self._problem: str | None = None
        self._prioritised: tuple[float, int] = (0.0, -1)
        self._complete_since: float | None = None
        self._told = False

    def close(self) -> None:
        """Stop the background work and close the journal."""
        self._completion.ended.set()
        with self._lock:
            if self._journal:
                self._journal.close()
            self._journal, self._deck, self._stamp, self._looked = None, None, None, 0.0

    def current(self) -> Deck | None:
        """The current round's deck, up to date with the journal; None if people have nothing to do."""
        with self._lock:
            if time.monotonic() - self._looked >= LOOK_SECONDS:
                self._look()
                self._looked = time.monotonic()
            if self._deck is None:
                return None
            assert self._journal is not None
            self._tally.add(self._journal.entries(self._deck.sampling, after=self._tally.last_seq))
            self._settle(self._deck)
            return self._deck

    def view(self, rater: str) -> View:
        """The rater's current view; a failure becomes its problem, so that other campaigns go on."""
        with self._lock:
            try:
                deck = self.current()
            except Exception as error:  # whatever the damage: show it, and look again later
                return View("waiting", problem=described(error))
            if deck is None:
                return View("waiting", problem=self._problem)
            standing, progress = self._tally.standing(rater), self._tally.progress()
            times = [entry.judged_at for entry in standing if entry.action == "answer"]
            problem = self._completion.error if progress.complete else self._problem
            undo = standing[-1].seq if standing and not self._closed else None
            state = "done" if progress.complete else "idle"
            given, asked = self._shares.steps(rater)
            view = View(
                state, deck, undo=undo, progress=progress, given=given, asked=asked, own=len(times), rate=_rate(times),
                problem=problem,
            )  # fmt: skip
            indices = [] if progress.complete else self._queue.next(rater)
            return self._asking(view, deck, rater, indices) if indices else view

    def judge(
        self, rater: str, ticket: str, submission: str, answer: Sequence[float] | None, seconds: float | None
    ) -> str:
        """Store an answer, or a skip (``answer`` None); return once it is on disk.

        Returns:
            A note for the rater, empty if there is nothing to say.

        Raises:
            GoneError: the round's images are gone, or the ticket is unknown.
            UnfitError: the answer does not fit the question.
            D3POError: it could not be written.
        """
        deck, question, attempt = self._asked(ticket)
        problem = None if answer is None else answer_problem(deck.mode, answer, len(question.sample_ids))
        if problem:
            raise UnfitError(f"this answer cannot be kept: {problem}; reload the page")
        self._check_quota(rater, deck, question)
        assert self._journal is not None
        said = Submission(
            submission, deck.sampling, rater, question.question_id, attempt, "skip" if answer is None else "answer",
            deck.mode, shown_order(deck, rater, question), None if answer is None else tuple(answer), seconds,
        )  # fmt: skip
        self._check_there(deck)
        kept, new = self._journal.append(said)
        self._check_there(deck)  # if the round went meanwhile, nobody asks for this entry's sampling again
        if not new and kept.submission != submission:
            return "You judged this in another window; that judgement was kept. Undo takes it back."
        current = self.current()
        if current is None or current.sampling != deck.sampling:
            return self._late_note(deck)
        return ""

    def undo(self, rater: str, number: int, submission: str) -> str:
        """Take back an entry of the rater; return once that is on disk.

        Returns:
            A note for the rater.

        Raises:
            D3POError: it could not be written.
        """
        # Retry once, in case the rater's other window judged the same question at the same moment.
        for _ in range(2):
            with self._lock:
                deck = self.current()
                entry = next((e for e in self._tally.standing(rater) if e.seq == number), None) if deck else None
                if deck is None or entry is None:
                    return "That was taken back already."
                if self._closed:
                    return "The round is done, so this stays."
                attempt = self._tally.attempt(rater, entry.question_id)
                said = Submission(
                    submission, deck.sampling, rater, entry.question_id, attempt, "undo", entry.mode, entry.shown, None,
                    None, entry.seq,
                )  # fmt: skip
            assert self._journal is not None
            kept, new = self._journal.append(said)
            if new or kept.submission == submission:
                break
        else:
            raise D3POError("another window of yours is judging the same question; nothing was taken back yet")
        with self._lock:
            deck = self.current()
            index = deck.number_of.get(said.question_id) if deck else None
            if index is not None:
                self._queue.put_first(rater, index)
        return "Taken back."

    def report(self, rater: str, ticket: str, submission: str, image: int, reason: Reason) -> str:
        """Store the rater's report of an image, or its withdrawal; return once it is on disk.

        Args:
            rater: who reports.
            ticket: of the question that shows the image.
            submission: the page's id for this message.
            image: the image's place on the page, from 0.
            reason: why, or ``withdrawn``.

        Returns:
            A note for the rater.

        Raises:
            GoneError: the question is not asked any more.
            UnfitError: the question has no such image.
            D3POError: it could not be written.
        """
        deck, question, _ = self._asked(ticket)
        shown = shown_order(deck, rater, question)
        if image >= len(shown):
            raise UnfitError(f"there is no image {image + 1} here, only {len(shown)}; reload the page")
        self._reports.add(rater, shown[image], deck.image_paths[shown[image]], reason, f"page-{submission}")
        return "Report taken back." if reason == "withdrawn" else f"Image {image + 1} is reported as {reason}."

    def _asking(self, view: View, deck: Deck, rater: str, indices: Sequence[int]) -> View:
        """The view with the first of these questions; the others probably come next."""
        question, *later = (deck.questions[index] for index in indices)
        attempt = self._tally.attempt(rater, question.question_id)
        shown = shown_order(deck, rater, question)
        return replace(
            view, state="question", question=question, shown=shown, before=self._before(rater, question, shown),
            flags=self._flags(deck, rater, shown),
            ahead=tuple(sample for following in later for sample in shown_order(deck, rater, following)),
            ticket=f"{deck.round_number}.{deck.sampling}.{attempt}.{question.question_id}",
            again=bool(self._tally.status(rater)[indices[0]] == SKIPPED),
        )  # fmt: skip

    def _before(self, rater: str, question: Question, shown: tuple[str, ...]) -> tuple[float, ...]:
        entry = self._tally.withdrawn(rater, question.question_id)
        if entry is None or entry.answer is None:
            return ()
        values = dict(zip(entry.shown, entry.answer, strict=True))
        return tuple(values[sample] for sample in shown)

    def _flags(self, deck: Deck, rater: str, shown: tuple[str, ...]) -> tuple[str, ...]:
        others = "hidden" if deck.config.judge.people.blur_reported else ""
        try:
            standing = self._reports.standing()
        except D3POError:  # a damaged file of reports stops nobody's judging; d3po raters tells of it
            standing = {}
        reports = [standing.get(sample, {}) for sample in shown]
        return tuple("mine" if rater in reported else others if reported else "" for reported in reports)

    @property
    def _closed(self) -> bool:
        """Return whether the deck is complete and in use, so that its answers stay."""
        return self.final and self._told and self._tally.progress().complete

    def _settle(self, deck: Deck) -> None:
        """Report a complete deck once its last answer is old enough; else order its questions."""
        if not self._tally.progress().complete:
            self._complete_since, self._told = None, False
            self._prioritise()
            return
        if self._complete_since is None:
            last = self._tally.last_at
            age = (datetime.now(UTC).replace(tzinfo=None) - last).total_seconds() if last else self._grace
            # A clock that was set back must not make the round wait for hours.
            self._complete_since = time.monotonic() - min(max(age, 0.0), self._grace)
        if time.monotonic() - self._complete_since >= self._grace:
            self._told = True
            self._tell(deck)

    def _look(self) -> None:
        """Follow the campaign on disk: another round, imported judgements."""
        try:
            number = waiting_round(self.campaign)
            sampling = None if number is None else sampling_of(self.campaign, number)
            if number is None or sampling is None:
                self._deck, self._stamp, self._problem = None, None, None
                return
            folder = partition(self.campaign, "judgements", number)
            brought_in = sorted(p.name for p in folder.glob("*.parquet") if not p.name.startswith(FILE_PREFIX))
            invitations = read_invitations(self.campaign)
            stamp = (number, sampling, brought_in, invitations)
            if stamp == self._stamp:
                return
            config = round_config(self.campaign, number)
            if config.judge.labeller == "proxy":
                self._deck, self._problem = None, None
            else:
                self._journal = self._journal or Journal(self.campaign)
                if self._mode:
                    self._journal.note(sampling, "mode", self._mode)
                self._open(load_deck(self.campaign, config, number, self._mode), invitations)
        except Exception as error:
            # Not the rater's fault, and often only too early, such as before the proxies finish: look again later.
            self._deck, self._stamp, self._problem = None, None, described(error)
            return
        self._stamp, self._problem = stamp, None

    def _tell(self, deck: Deck) -> None:
        """Report that the deck has enough; called at every look."""
        assert self._journal is not None
        self._completion.begin(self._journal, deck.sampling, deck.round_number)

    def _check_there(self, deck: Deck) -> None:
        if sampling_of(self.campaign, deck.round_number) != deck.sampling:
            raise GoneError(GONE)

    def _check_quota(self, rater: str, deck: Deck, question: Question) -> None:
        with self._lock:
            if deck is self._deck and self._shares.exhausted(rater, deck.number_of[question.question_id]):
                raise UnfitError("this answer was not kept: you have judged all the groups that you were asked to")

    def _late_note(self, deck: Deck) -> str:
        """The note to a rater whose judgement was stored after its deck was finished."""
        return f"Kept. Round {deck.round_number} had gone on by then, so training may not have used it."

    def _open(self, deck: Deck, invitations: Invitations = OPEN) -> None:
        assert self._journal is not None
        self._deck = deck
        self._tally = Tally(deck, self._journal.entries(deck.sampling))
        split = agreed_split(self._journal, self._tally, invitations)
        self._shares = Shares(self._tally, invitations, split and split.groups)
        self._queue = Queue(self._tally, self._shares)
        self._prioritised = (0.0, -1)
        self._complete_since, self._told = None, False

    def _prioritise(self) -> None:
        """Compute priorities in the background if there are new judgements."""
        at, seq = self._prioritised
        if self._priority is None or seq == self._tally.last_seq or time.monotonic() - at < PRIORITY_SECONDS:
            return
        self._prioritised = (time.monotonic(), self._tally.last_seq)
        threading.Thread(target=self._set_priority, args=(self._priority, self._deck, self._queue), daemon=True).start()

    def _set_priority(self, priority: Priority, deck: Deck, queue: Queue) -> None:
        try:
            queue.set_priority(priority(deck.config, deck.round_number, [q.sample_ids for q in deck.questions]))
        except Exception as error:  # judging can go on without an order
            self._problem = f"the order of questions is random: {error or type(error).__name__}"

    def _asked(self, ticket: str) -> tuple[Deck, Question, int]:
        found = TICKET.fullmatch(ticket)
        if found is None:
            raise GoneError("this page is out of date; reload it")
        number, sampling, attempt, question_id = int(found[1]), found[2], int(found[3]), found[4]
        deck = self.current()
        if deck is None or deck.sampling != sampling or question_id not in deck.number_of:
            deck = self._earlier(number, sampling, question_id.partition(":")[0])
        if question_id not in deck.number_of:
            raise GoneError("this question is not asked any more; reload the page")
        return deck, deck.questions[deck.number_of[question_id]], attempt

    def _earlier(self, number: int, sampling: str, mode: str) -> Deck:
        """The deck of a page that was opened before the round went on or the mode changed."""
        if mode not in WAYS or sampling_of(self.campaign, number) != sampling:
            raise GoneError(GONE)
        with self._lock:
            self._journal = self._journal or Journal(self.campaign)
        return load_deck(self.campaign, round_config(self.campaign, number), number, mode)


def described(error: Exception) -> str:
    """An error as text for people; an unexpected one has its type's name."""
    return str(error) if isinstance(error, D3POError) else f"{type(error).__name__}: {error}"


def _rate(times: Sequence[datetime]) -> float | None:
    now = datetime.now(UTC).replace(tzinfo=None)
    recent = [at for at in times[-RATE_ANSWERS:] if now - at < timedelta(minutes=10)]
    span = (recent[-1] - recent[0]).total_seconds() / 60 if len(recent) > 2 else 0.0
    return (len(recent) - 1) / span if span > 0 else None
