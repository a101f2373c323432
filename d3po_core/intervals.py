"""Means with intervals, and a test of a mean against a bound. Units are prompts: images of one are alike.

Names in shapes: R rows, I images, U units that are independent of each other.

The interval is Student's t. For skewed units it is widened by P. Hall, "On the Removal of Skewness by Transformation",
JRSS B 54 (1992), Eq. 2.2 and its inverse. ``tests/benchmarks/coverage.py`` measures its coverage.
"""

import functools
import math

import numpy as np
from scipy.stats import beta, t

from d3po_core.records import ScoreSummary

CONFIDENCE = 0.95
# With fewer units, even a unanimous sign test (2 * 0.5^5 = 0.06) would not reach 5 %.
MIN_UNITS = 6
# This many units must differ from the most common value: a few changed images do not show how far others may move.
MIN_UNLIKE = 5
# Samples more skewed than this come from distributions whose tail they have not shown yet; use a higher confidence.
STRONG_SKEW, SKEW_CONFIDENCE = 1.0, 0.98


def unit_means(scores: np.ndarray, prompts: list[str]) -> np.ndarray:
    """Return means ``[..., U]`` of scores ``[..., I]`` over each prompt's images; for one prompt, the scores.

    Equal rows have equal means, to the last bit. A matrix product may round its last rows differently, and would then
    rank checkpoints that draw the same images.
    """
    if len(set(prompts)) == 1:
        return scores
    prompt_I, _ = units_of(prompts)
    counts_U = np.bincount(prompt_I)
    first_U = np.cumsum(counts_U) - counts_U
    return np.add.reduceat(scores[..., np.argsort(prompt_I, kind="stable")], first_U, axis=-1) / counts_U


def units_of(prompts: list[str]) -> tuple[np.ndarray, int]:
    """Return each image's unit ``[I]``, its prompt or itself if all share one, and the number of units."""
    distinct, prompt_I = np.unique(np.asarray(prompts, dtype=object), return_inverse=True)
    if len(distinct) == 1:
        return np.arange(len(prompts)), len(prompts)
    return prompt_I, len(distinct)


def mean_intervals(units: np.ndarray, shares: bool = False) -> list[ScoreSummary]:
    """Return each row's mean over ``[R, U]`` with its 95 % interval; infinite ends if the units are too few.

    Args:
        units: one number per unit.
        shares: whether every unit lies between 0 and 1. Too few of them still get Clopper-Pearson's interval, since
            among such numbers with one mean, zeros and ones spread most.
    """
    rows = []
    for row_U in units:
        mean, (_, counts) = float(row_U.mean()), np.unique(row_U, return_counts=True)
        if len(row_U) - int(counts.max()) >= MIN_UNLIKE:
            low, high = _interval(row_U)
            low, high = (max(low, 0.0), min(high, 1.0)) if shares else (low, high)
        elif shares:
            low, high = _whole_shares(float(row_U.sum()), len(row_U))
        elif len(counts) == 1 and len(row_U) >= MIN_UNITS and mean != 0:
            low = high = mean  # all moved alike
        else:
            low, high = -np.inf, np.inf
        rows.append(ScoreSummary(mean=mean, low=low, high=high))
    return rows


def score_intervals(scores: np.ndarray, prompts: list[str]) -> list[ScoreSummary]:
    """Return each row's mean over prompts of ``[R, I]`` with its interval; scores of 0 and 1 are shares."""
    return mean_intervals(unit_means(scores, prompts), shares=bool(np.isin(scores, (0, 1)).all()))


def chance_of_as_high(units_U: np.ndarray, bound: float = 0.0) -> float:
    """Return Student's one-sided p-value for "the mean is at most ``bound``"; 1 if too few units differ from it."""
    above_U = units_U - bound
    if np.count_nonzero(above_U) < MIN_UNITS:
        return 1.0
    deviation = above_U.std(ddof=1)
    if deviation == 0:
        return float(above_U[0] < 0)
    return float(t.sf(above_U.mean() / deviation * np.sqrt(len(above_U)), len(above_U) - 1))


@functools.cache
def share_interval(right: float, count: int) -> tuple[float, float]:
    """Return a share's Clopper-Pearson 95 % interval, exact for whole counts; 0 to 1 if there are none."""
    tail, wrong = (1 - CONFIDENCE) / 2, count - right
    low = float(beta.ppf(tail, right, wrong + 1)) if right > 0 else 0.0
    return low, float(beta.ppf(1 - tail, right + 1, wrong)) if wrong > 0 else 1.0


def _whole_shares(right: float, count: int) -> tuple[float, float]:
    return share_interval(math.floor(right), count)[0], share_interval(math.ceil(right), count)[1]


def _interval(units_U: np.ndarray) -> tuple[float, float]:
    """Return the outer ends of Student's and Hall's intervals, chosen separately for each end."""
    count, mean = len(units_U), units_U.mean()
    error = units_U.std(ddof=1) / np.sqrt(count)
    half = _student((1 + CONFIDENCE) / 2, count - 1)
    third = _skewness(units_U)
    strong = abs(third) > STRONG_SKEW
    quantile = _student((1 + SKEW_CONFIDENCE) / 2, (count - 1) / 2) if strong else half
    low, high = (mean - _unskewed(sign * quantile, third, count) * error for sign in (1, -1))
    return float(min(low, mean - half * error)), float(max(high, mean + half * error))


def _skewness(units_U: np.ndarray) -> float:
    """Return ``scipy.stats.skew(units_U, bias=False)``, which checks its arguments for ten times as long."""
    count, mean = len(units_U), units_U.mean()
    second = ((units_U - mean) ** 2).mean()
    if second <= (np.finfo(units_U.dtype).resolution * mean) ** 2:
        return math.nan
    third = ((units_U - mean) ** 2 * (units_U - mean)).mean()
    return float(np.sqrt((count - 1.0) * count) / (count - 2.0) * third / second**1.5)


@functools.cache
def _student(probability: float, degrees: float) -> float:
    return float(t.ppf(probability, degrees))


def _unskewed(quantile: float, third: float, count: int) -> float:
    """Return the quantile of Student's statistic for units with this skewness, by inverting Hall's transformation."""
    bend = third / np.sqrt(count)
    if abs(bend) < 1e-8:
        return quantile
    return 3 / bend * (np.cbrt(1 + bend * (quantile - third / (6 * np.sqrt(count)))) - 1)
