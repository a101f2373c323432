"""What one rater sees of a campaign at the moment."""

from dataclasses import dataclass
from pathlib import Path

from d3po_core.people.tally import Deck, Progress, Question
from d3po_core.store.goals import nothing_more_to_do


@dataclass(frozen=True)
class View:
    """A rater's view.

    Attributes:
        state: ``question``, ``idle`` (nothing left for this rater), ``done`` (the deck has enough) or ``waiting``
            (no deck to judge).
        deck: all questions, None if there are none.
        question: the current question.
        shown: its sample ids in page order.
        ahead: sample ids of the questions that probably come next.
        ticket: identifies question and attempt in the answer.
        again: whether the rater skipped this question before.
        before: the answer that the rater has just taken back, in page order; empty if there is none.
        flags: per image of ``shown``: ``mine`` if the rater reported it, ``hidden`` if others did, else empty.
        undo: number of the rater's last entry, which may be taken back.
        progress: of the round.
        given, asked: answers as this rater's page counts them; see ``Tally.steps``.
        own: answers of this rater in the round.
        rate: this rater's recent answers per minute, None if there are too few.
        problem: a failure in the background, for people to see.
    """

    state: str
    deck: Deck | None = None
    question: Question | None = None
    shown: tuple[str, ...] = ()
    ahead: tuple[str, ...] = ()
    ticket: str = ""
    again: bool = False
    before: tuple[float, ...] = ()
    flags: tuple[str, ...] = ()
    undo: int | None = None
    progress: Progress | None = None
    given: int = 0
    asked: int = 0
    own: int = 0
    rate: float | None = None
    problem: str | None = None

    @property
    def unit(self) -> str:
        """The unit of the page's counts."""
        if self.deck is None or self.deck.mode == "pair":
            return "pairs"
        return "groups" if self.deck.config.judge.people.raters_per_group == 1 else "answers"


def ended(view: View, campaign: Path) -> bool:
    """Whether a campaign that asks nothing is finished, so that nobody needs to wait for it."""
    try:
        return view.state == "waiting" and view.problem is None and nothing_more_to_do(campaign)
    except Exception:  # damage that the run itself reports
        return False
