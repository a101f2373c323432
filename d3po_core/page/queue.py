"""Choose the question that a rater gets next.

About every third turn is a question with a known answer, until the rater has had them all. The other turns are
questions of groups that still need raters: first those that nobody else looks at, then by priority, then those with the
fewest raters, then at random per rater. Last come those that the rater skipped once.
"""

import random
import time

import numpy as np

from d3po_core.people.shares import Shares
from d3po_core.people.tally import SKIPPED, UNSEEN, Deck, Question, Tally

# Questions set aside per rater: the one shown, and those whose images the page loads in advance.
AHEAD = 3
LEASE_SECONDS = 180.0
GOLD_SHARE = 1 / 3


class Queue:
    """The order of a deck's questions for every rater.

    Args:
        tally: counts of who has judged what.
        shares: what each rater may be asked; by default everything.
    """

    def __init__(self, tally: Tally, shares: Shares | None = None) -> None:
        self._tally, size = tally, len(tally.deck.questions)
        self._shares = shares or Shares(tally)
        self._priority = np.zeros(size)
        self._leased_until = np.zeros(size)
        self._leased_by = np.full(size, -1)
        self._raters: dict[str, int] = {}
        self._random: dict[str, np.ndarray] = {}
        self._aside: dict[str, list[int]] = {}

    def set_priority(self, priority: np.ndarray) -> None:
        """Ask questions with high numbers first.

        Raises:
            ValueError: not one finite number per question.
        """
        priority = np.asarray(priority, float)
        if priority.shape != self._priority.shape or not np.isfinite(priority).all():
            raise ValueError(f"priorities of shape {priority.shape}; expected {len(self._priority)} finite numbers")
        self._priority = priority

    def put_first(self, rater: str, index: int) -> None:
        """Ask the rater this question next."""
        aside = self._aside.setdefault(rater, [])
        self._aside[rater] = [index, *(other for other in aside if other != index)]

    def next(self, rater: str) -> list[int]:
        """The rater's next question and its likely successors, set aside for the rater for a while."""
        tally, status = self._tally, self._tally.status(rater)
        needed = tally.open_questions() & self._shares.mask(rater)
        known, fresh = (status == UNSEEN) & tally.deck.gold, (status == UNSEEN) & needed
        if not (known | fresh).any():
            fresh = (status == SKIPPED) & (needed | tally.deck.gold)  # else raters would recognise skipped gold
        aside = [index for index in self._aside.get(rater, []) if known[index] or fresh[index]]
        turn = int((status != UNSEEN).sum())
        while len(aside) < AHEAD:
            known[aside] = fresh[aside] = False
            # This decides only the order. It is seeded, so a restart continues alike, and nobody can tell which are
            # known.
            draw = random.Random(f"{tally.deck.sampling} {rater} {turn + len(aside)}").random()
            mask = known if known.any() and (draw < GOLD_SHARE or not fresh.any()) else fresh
            if not mask.any():
                break
            aside.append(self._best(mask, rater))
        self._aside[rater] = aside
        self._leased_until[aside] = time.monotonic() + LEASE_SECONDS
        self._leased_by[aside] = self._number(rater)
        return list(aside)

    def _best(self, mask: np.ndarray, rater: str) -> int:
        left = np.flatnonzero(mask)
        mine = self._leased_by[left] == self._number(rater)
        leased = (self._leased_until[left] > time.monotonic()) & ~mine
        left = left[leased == leased.min()]
        left = left[self._priority[left] == self._priority[left].max()]
        left = left[self._tally.counts[left] == self._tally.counts[left].min()]
        return int(left[self._random_order(rater)[left].argmin()])

    def _number(self, rater: str) -> int:
        return self._raters.setdefault(rater, len(self._raters))

    def _random_order(self, rater: str) -> np.ndarray:
        if rater not in self._random:
            generator = np.random.default_rng(list(f"{self._tally.deck.sampling} {rater}".encode()))
            self._random[rater] = generator.permutation(len(self._priority))
        return self._random[rater]


def shown_order(deck: Deck, rater: str, question: Question) -> tuple[str, ...]:
    """The question's samples in this rater's page order: random per rater, the same at every look."""
    generator = random.Random(f"{deck.sampling} {rater} {question.question_id}")
    return tuple(generator.sample(question.sample_ids, len(question.sample_ids)))
