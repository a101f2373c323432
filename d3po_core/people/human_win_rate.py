"""Human win rate: how often people, seeing both blind, prefer a checkpoint's held-out images to a reference's.

A tie is half a win. If several people judged a pair, their mean counts once. The interval is over prompts, as in
``comparison``: it predicts other prompts, judged by the same people.
"""

from datetime import datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from d3po_core.evaluation.comparison import BETTER, UNCLEAR, WORSE
from d3po_core.intervals import MIN_UNITS, mean_intervals, unit_means
from d3po_core.queries.views import connect_views
from d3po_core.records import ScoreSummary


class HumanWinRate(BaseModel):
    """A round against a reference, as people judged it.

    Attributes:
        round: the round.
        against: the reference's round, 0 for the base.
        win_rate: share of pairs in which people prefer the round's image, ties half, with its 95 % interval.
        num_units: prompts that the interval is over; pairs if there is only one prompt.
        num_pairs: pairs that somebody judged.
        num_judgements: judgements of them that were not taken back.
        num_ties: judgements that call both images equal.
        num_raters: people who judged.
        last_at: time of the last judgement, naive UTC.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    round: int
    against: int
    win_rate: ScoreSummary
    num_units: int
    num_pairs: int
    num_judgements: int
    num_ties: int
    num_raters: int
    last_at: datetime

    @property
    def verdict(self) -> str:
        """``better`` or ``worse`` if the interval excludes one half and there are enough units."""
        if self.num_units >= MIN_UNITS and self.win_rate.low > 0.5:
            return BETTER
        if self.num_units >= MIN_UNITS and self.win_rate.high < 0.5:
            return WORSE
        return UNCLEAR

    @property
    def reference(self) -> str:
        """``base`` or ``round 12``."""
        return f"round {self.against}" if self.against else "base"

    def turned(self) -> "HumanWinRate":
        """The same rate with round and reference swapped."""
        rate = self.win_rate
        win_rate = ScoreSummary(mean=1 - rate.mean, low=1 - rate.high, high=1 - rate.low)
        return self.model_copy(update={"round": self.against, "against": self.round, "win_rate": win_rate})


def human_win_rates(campaign: Path) -> list[HumanWinRate]:
    """A win rate per judged round and reference, from the view ``human_comparisons``."""
    if not any(campaign.glob("comparisons/round=*/*.parquet")):  # the views read every table of every round
        return []
    with connect_views(campaign) as connection:
        totals = connection.sql(_TOTALS).to_arrow_table().to_pylist()
        pairs = connection.sql(_PAIRS).fetchnumpy()
    rates = []
    for total in totals:
        own = (pairs["round"] == total["round"]) & (pairs["against"] == total["against"])
        units_U = unit_means(pairs["share"][own], pairs["prompt"][own].tolist())
        rates.append(
            HumanWinRate(**total, win_rate=mean_intervals(units_U[None], shares=True)[0], num_units=len(units_U))
        )
    return rates


def human_win_rate(rates: list[HumanWinRate], round_number: int, against: int) -> HumanWinRate | None:
    """The rate of a round against a reference, swapped if they were compared the other way; None if never."""
    for rate in rates:
        if (rate.round, rate.against) == (round_number, against):
            return rate
        if (rate.round, rate.against) == (against, round_number):
            return rate.turned()
    return None


_TOTALS = """
SELECT round, against, count(DISTINCT (sample_id, against_id)) AS num_pairs, count(*) AS num_judgements,
       count(*) FILTER (vote = 0) AS num_ties, count(DISTINCT rater) AS num_raters, max(judged_at) AS last_at
FROM human_comparisons GROUP BY round, against ORDER BY round, against
"""

_PAIRS = """
SELECT round, against, prompt, avg((vote + 1) / 2) AS share
FROM human_comparisons GROUP BY round, against, sample_id, against_id, prompt
ORDER BY round, against, prompt, sample_id, against_id
"""
