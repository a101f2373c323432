"""Gold questions: images whose order is known, mixed in among the others, and what they say about a rater."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa
from scipy.special import betainc, betaln

from d3po_core.intervals import share_interval

# At most so many raters who reach the floor are ever left out, however often their answers are looked at.
ERROR = 0.05
PAIR = ["group_id", "first_member", "second_member", "first_id", "second_id"]


@dataclass(frozen=True)
class GoldScore:
    """Gold questions that a rater answered, and how many were right; a half-right one counts in part."""

    answered: int = 0
    right: float = 0.0

    def __add__(self, other: "GoldScore") -> "GoldScore":
        return GoldScore(self.answered + other.answered, self.right + other.right)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the share of right answers, for one look at them; 0 to 1 without any answer."""
        return share_interval(self.right, self.answered)

    def evidence_below(self, floor: float) -> float:
        """How much more likely the answers are from somebody below the floor than from somebody on it.

        The likelihood ratio, averaged over all accuracies from 0 to ``floor``. For a rater whose accuracy is at least
        ``floor`` its mean is at most 1 after every answer, so that the chance of it ever reaching 1 / a is at most a,
        however often one looks. Half-right answers only lower it.

        Source: Ville's inequality for a mixture martingale; Howard, Ramdas, McAuliffe and Sekhon, "Time-uniform,
        nonparametric, nonasymptotic confidence sequences", Annals of Statistics 49 (2021), Section 3.2.
        """
        right, wrong = self.right, self.answered - self.right
        below = betaln(right + 1, wrong + 1) + np.log(betainc(right + 1, wrong + 1, floor)) - np.log(floor)
        return float(np.exp(below - right * np.log(floor) - wrong * np.log1p(-floor)))


def gold_scores(votes: pa.Table) -> dict[str, GoldScore]:
    """How each person answered the gold questions among the votes.

    A question is a group of which gold says that some image is better than another. Its score is the mean over those
    pairs: 1 for the same order, 1/2 for a tie, 0 for the opposite; guessing scores 1/2 on average, however people
    judge. The pairs of a group are one question because they stand and fall together: one wrong mark is wrong in
    several pairs.

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
    """Raters who are below the floor for sure, also when their answers are looked at after every question.

    Of raters at the floor at most 5 % are ever left out, see ``GoldScore.evidence_below``. At a floor of 0.6 nobody is
    left out for fewer than five wrong answers, and one who answered too few questions to tell is kept.
    """
    if not 0 < accuracy_floor < 1:  # nobody is below 0; below 1 is whoever was ever wrong
        return sorted(rater for rater, score in gold.items() if accuracy_floor == 1 and score.right < score.answered)
    return sorted(rater for rater, score in gold.items() if score.evidence_below(accuracy_floor) >= 1 / ERROR)


def sum_scores(*parts: Mapping[str, GoldScore]) -> dict[str, GoldScore]:
    """Gold scores of several rounds, a rater at a time."""
    total: dict[str, GoldScore] = {}
    for part in parts:
        for rater, score in part.items():
            total[rater] = total.get(rater, GoldScore()) + score
    return total


def votes_frame(votes: pa.Table) -> pd.DataFrame:
    """Votes as pandas, with whole numbers for votes; the other columns of the table are dropped."""
    return votes.select([*PAIR, "rater", "rater_kind", "vote"]).to_pandas().astype({"vote": int})
