"""Count who has judged what and what is missing, from a round's questions and the journal's entries.

A question shows images of one prompt and is answered in one of four ways: ``pair`` (which of two is better),
``mark_bad`` (which of the group are bad), ``best`` (which one is best), ``rank`` (from best to worst). It names its
images by sample_id only, and their files are looked up separately, so one question's images may come from two
checkpoints.

A rater finishes a question by answering it, or by skipping it twice: after the first skip it comes back at the end.
A group is done when every question of it has ``raters_per_group`` raters.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import numpy as np

from d3po_core.config import CampaignConfig
from d3po_core.people.journal import Entry, next_attempt
from d3po_core.ways import WAYS

UNSEEN, SKIPPED, ANSWERED = 0, 1, 2


@dataclass(frozen=True)
class Question:
    """Images of one prompt to judge together; ``sample_ids`` are in table order, not page order."""

    question_id: str
    group_id: str
    prompt: str
    sample_ids: tuple[str, ...]


@dataclass(frozen=True)
class Deck:
    """All questions of a round or a blind comparison.

    Attributes:
        campaign: the campaign's folder.
        config: the configuration that the round began with.
        round_number: the round; 0 in a blind comparison, whose page hides the rounds.
        sampling: id of the sampling; see ``journal.sampling_of``, or the id of a blind comparison.
        mode: pair, mark_bad, best or rank.
        questions: the questions, group by group; groups for people come first.
        group_of: [Q] number of each question's group.
        num_groups: groups for people; higher numbers belong to groups asked only because their answer is known.
        image_paths: file of each sample, relative to the campaign.
        elsewhere: [Q] people whose judgements of a question were imported.
        gold: [Q] whether the answer is known.
    """

    campaign: Path
    config: CampaignConfig
    round_number: int
    sampling: str
    mode: str
    questions: tuple[Question, ...]
    group_of: np.ndarray
    num_groups: int
    image_paths: dict[str, str]
    elsewhere: tuple[frozenset[str], ...]
    gold: np.ndarray
    number_of: dict[str, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        numbers = {question.question_id: number for number, question in enumerate(self.questions)}
        object.__setattr__(self, "number_of", numbers)


@dataclass(frozen=True)
class Progress:
    """People's progress with a round.

    Attributes:
        groups_needed: groups that must be done before the round goes on.
        groups_done: groups for people that have enough raters; may exceed ``groups_needed``.
        judgements: people's standing answers, given on the page or imported.
        raters: people who judged.
        asked: answers that all groups need together.
        missing: those of them that are not given yet.
        complete: whether the round can go on.
    """

    groups_needed: int
    groups_done: int
    judgements: int
    raters: int
    asked: int
    missing: int
    complete: bool


def answer_problem(mode: str, answer: Sequence[float], size: int) -> str | None:
    """The problem with an answer (as in ``journal.Submission``) to a question of ``size`` images; None if valid."""
    values = sorted(answer)
    if len(answer) != size:
        return f"{len(answer)} values for {size} images"
    return None if WAYS[mode].fits(values, size) else f"its values are no answer in mode {mode}"


class Tally:
    """Counts of who has judged what, from the journal's entries and imported judgements.

    Attributes:
        deck: the questions.
        counts: [Q] raters who are done with each question.
        last_seq: number of the last entry that was added.
        last_at: its time, naive UTC; None if there is none.
    """

    def __init__(self, deck: Deck, entries: Iterable[Entry] = ()) -> None:
        self.deck, self.last_seq = deck, 0
        self.last_at: datetime | None = None
        self._needed = deck.config.judge.people.raters_per_group
        self._sizes = np.bincount(deck.group_of, minlength=deck.num_groups)[: deck.num_groups]
        self._done_by: list[set[str]] = [set(raters) for raters in deck.elsewhere]
        self.counts = np.array([len(raters) for raters in self._done_by], int)
        self._entries: dict[tuple[str, int], list[Entry]] = defaultdict(list)
        self._attempts: dict[tuple[str, str], int] = defaultdict(int)
        self._status: dict[str, np.ndarray] = {}
        self._standing: dict[str, dict[int, Entry]] = defaultdict(dict)  # by rater and number, in order
        self._withdrawn: dict[tuple[str, str], Entry] = {}
        self._answers: Counter[str] = Counter()
        self._answers_elsewhere = sum(map(len, deck.elsewhere))
        self._raters_elsewhere = frozenset[str]().union(*deck.elsewhere)
        self.add(entries)

    def add(self, entries: Iterable[Entry]) -> None:
        """Add entries in journal order; entries on questions outside this deck change no count."""
        for entry in entries:
            self.last_seq, self.last_at = max(self.last_seq, entry.seq), entry.judged_at
            key = entry.rater, entry.question_id
            self._attempts[key] = max(self._attempts[key], next_attempt([entry]))
            standing = self._standing[entry.rater]
            self._withdrawn.pop(key, None)
            if entry.action == "undo":
                assert entry.undoes is not None
                gone = standing.pop(entry.undoes, None)
                self._answers[entry.rater] -= gone is not None and gone.action == "answer"
                if gone is not None:
                    self._withdrawn[key] = gone
            else:
                standing[entry.seq] = entry
                self._answers[entry.rater] += entry.action == "answer"
            self._recount(entry)

    def status(self, rater: str) -> np.ndarray:
        """[Q] the rater's UNSEEN, SKIPPED (once) or ANSWERED; do not modify it."""
        if rater not in self._status:
            elsewhere = [rater in raters for raters in self._done_by]
            self._status[rater] = np.where(elsewhere, ANSWERED, UNSEEN).astype(np.int8)
        return self._status[rater]

    def attempt(self, rater: str, question_id: str) -> int:
        """The attempt of the rater's next entry on a question; see ``journal.next_attempt``."""
        return self._attempts[rater, question_id]

    def standing(self, rater: str) -> list[Entry]:
        """The rater's answers and skips that were not taken back, in order."""
        return list(self._standing[rater].values())

    def withdrawn(self, rater: str, question_id: str) -> Entry | None:
        """The rater's entry on a question, if the last thing that the rater did there was to take it back."""
        return self._withdrawn.get((rater, question_id))

    def open_questions(self) -> np.ndarray:
        """[Q] questions of groups for people that need another rater."""
        return (self.counts < self._needed) & (self.deck.group_of < self.deck.num_groups)

    def progress(self) -> Progress:
        """The round's progress."""
        deck, for_people = self.deck, self.deck.group_of < self.deck.num_groups
        done = np.bincount(deck.group_of[(self.counts >= self._needed) & for_people], minlength=deck.num_groups)
        groups_done = int((done == self._sizes).sum())
        # 0.07 * 100 exceeds 7 by a rounding error, so subtract a tiny part of a group.
        needed = math.ceil(deck.config.judge.people.enough * deck.num_groups - 1e-8)
        raters = {rater for rater, answers in self._answers.items() if answers}
        missing = int(np.maximum(self._needed - self.counts[for_people], 0).sum())
        asked = int(for_people.sum()) * self._needed
        return Progress(
            needed, groups_done, self._answers.total() + self._answers_elsewhere,
            len(raters | self._raters_elsewhere), asked, missing, groups_done >= needed,
        )  # fmt: skip

    def steps(self, rater: str) -> tuple[int, int]:
        """Answers given and answers asked, as the rater's page counts them.

        Each of the rater's answers adds one, also to a gold question: those count per rater. Counted over all people,
        they would not move the page's number, and so the rater could tell them from the others.
        """
        gold, for_people = self.deck.gold, self.deck.group_of < self.deck.num_groups
        shared = for_people & ~gold
        given = np.minimum(self.counts[shared], self._needed).sum() + (self.status(rater)[gold] == ANSWERED).sum()
        return int(given), int(shared.sum()) * self._needed + int(gold.sum())

    def _recount(self, entry: Entry) -> None:
        index = self.deck.number_of.get(entry.question_id)
        if index is None:
            return
        rater, key = entry.rater, (entry.rater, index)
        if entry.action == "undo":
            self._entries[key] = [e for e in self._entries[key] if e.seq != entry.undoes]
        else:
            self._entries[key].append(entry)
        actions = [e.action for e in self._entries[key]]
        done = rater in self.deck.elsewhere[index] or "answer" in actions or len(actions) > 1
        self.status(rater)[index] = ANSWERED if done else SKIPPED if actions else UNSEEN
        (self._done_by[index].add if done else self._done_by[index].discard)(rater)
        self.counts[index] = len(self._done_by[index])
