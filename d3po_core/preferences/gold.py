"""Gold questions: images of known order, mixed in among the others, to measure a rater's accuracy."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa
from scipy.special import betainc, betaln

from d3po_core.intervals import share_interval

# The largest share of raters at the floor who are ever left out, however often we look at their answers.
ERROR = 0.05
PAIR = ["group_id", "first_member", "second_member", "first_id", "second_id"]


@dataclass(frozen=True)
class GoldScore:
    """A rater's number of answered gold questions, and of right ones; partly right answers count in part."""

    answered: int = 0
    right: float = 0.0

    def __add__(self, other: "GoldScore") -> "GoldScore":
        return GoldScore(self.answered + other.answered, self.right + other.right)

    @property
    def interval(self) -> tuple[float, float]:
        """Return the 95 % interval of the share of right answers, for a single look; 0 to 1 without answers."""
        return share_interval(self.right, self.answered)

    def evidence_below(self, floor: float) -> float:
        """Return the likelihood ratio of the answers: accuracy below ``floor`` against accuracy at ``floor``.

        The ratio is averaged over all accuracies from 0 to ``floor``. If the rater's accuracy is at least ``floor``,
        its mean is at most 1 after every answer. The chance that it ever reaches 1 / a is then at most a, however often
        one looks. Half-right answers only lower it.

        Source: Ville's inequality for a mixture martingale; Howard, Ramdas, McAuliffe and Sekhon, "Time-uniform,
        nonparametric, nonasymptotic confidence sequences", Annals of Statistics 49 (2021), Section 3.2.
        """
        right, wrong = self.right, self.answered - self.right
        below = betaln(right + 1, wrong + 1) + np.log(betainc(right + 1, wrong + 1, floor)) - np.log(floor)
        return float(np.exp(below - right * np.log(floor) - wrong * np.log1p(-floor)))


def gold_scores(votes: pa.Table) -> dict[str, GoldScore]:
    """Return each person's score on the gold questions among the votes.

    A question is a group in which gold prefers some image to another. Its score is the mean over those pairs: 1 for the
    same order, 1/2 for a tie, 0 for the opposite. Guessing scores 1/2 on average, however people judge. A group's pairs
    form one question because they are not independent: one wrong mark makes several pairs wrong.

    Args:
        votes: the table of ``d3po_core.preferences.deriving.collect_votes``.
    """
    frame = votes_frame(votes)
    gold = frame[frame.rater_kind == "gold"].groupby(PAIR).vote.sum().rename("answer").reset_index()
    people = frame[frame.rater_kind == "human"].merge(gold[gold.answer != 0], on=PAIR)
    people["right"] = (1 + people.vote * np.sign(people.answer)) / 2
    questions = people.groupby(["rater", "group_id"]).right.mean().groupby("rater")
    return {
        str(rater): GoldScore(int(n), float(right)) for rater, n, right in questions.agg(["size", "sum"]).itertuples()
    }


def left_out(gold: Mapping[str, GoldScore], accuracy_floor: float) -> list[str]:
    """Return the raters who are surely below the floor, even if we test them after every question.

    At most 5 % of raters at the floor are ever left out, see ``GoldScore.evidence_below``. At a floor of 0.6, leaving
    out a rater takes at least five wrong answers. Raters with too few answers to tell are kept.
    """
    if not 0 < accuracy_floor < 1:  # nobody is below 0; one error puts a rater below 1
        return sorted(rater for rater, score in gold.items() if accuracy_floor == 1 and score.right < score.answered)
    return sorted(rater for rater, score in gold.items() if score.evidence_below(accuracy_floor) >= 1 / ERROR)


def sum_scores(*parts: Mapping[str, GoldScore]) -> dict[str, GoldScore]:
    """Add up each rater's gold scores over several rounds."""
    total: dict[str, GoldScore] = {}
    for part in parts:
        for rater, score in part.items():
            total[rater] = total.get(rater, GoldScore()) + score
    return total


def votes_frame(votes: pa.Table) -> pd.DataFrame:
    """Return votes as a pandas frame, with integer votes and only the needed columns."""
    return votes.select([*PAIR, "rater", "rater_kind", "vote"]).to_pandas().astype({"vote": int})
