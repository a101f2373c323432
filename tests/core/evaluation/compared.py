"""A campaign with evaluated rounds that people can compare blind; what raters say goes straight into its journal."""

import itertools
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from d3po_core.page.queue import shown_order
from d3po_core.people.blind import BlindComparison, comparison_deck
from d3po_core.people.journal import Entry, Journal, Submission
from tests.core.little_campaign import LittleCampaign

numbers = itertools.count()


def evaluated(folder: Path, prompts: int = 8, seeds: int = 3, rounds: int = 2, **options: Any) -> Path:
    """Rounds 0 to ``rounds`` with held-out images of noise; the second half of the rounds was rejected by the guard."""
    campaign = LittleCampaign(folder, [f"a thing of kind {i}" for i in range(prompts)], seeds=seeds, **options)
    for number in range(rounds + 1):
        campaign.add_round(number, np.full((prompts, seeds), 0.1 * number), verdict="rejected" if number > 1 else "ok")
    return folder


def say(
    campaign: Path, comparison: BlindComparison, number: int, vote: float | None, rater: str = "ann", attempt: int = 0,
    undoes: int | None = None,
) -> Entry:  # fmt: skip
    """An answer on a pair: 1 for the round's image, -1 for the reference's, 0; None is a skip; or an undo."""
    deck = comparison_deck(campaign, comparison)
    question = deck.questions[number]
    shown = shown_order(deck, rater, question)
    sign = [1 if sample == comparison.pairs[number].sample_id else -1 for sample in shown]
    action = "undo" if undoes is not None else "skip" if vote is None else "answer"
    answer = None if vote is None or undoes is not None else tuple(vote * s for s in sign)
    with closing(Journal(campaign)) as journal:
        entry, new = journal.append(
            Submission(f"{next(numbers):032x}", comparison.id, rater, question.question_id, attempt, action, deck.mode,
                       shown, answer, 2.0, undoes)
        )  # fmt: skip
    assert new
    return entry


def say_all(campaign: Path, comparison: BlindComparison, vote: Callable[[int], float], rater: str = "ann") -> None:
    for number in range(len(comparison.pairs)):
        say(campaign, comparison, number, vote(number), rater)
