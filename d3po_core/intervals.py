"""Means with intervals, and whether a mean is surely above a bound. Units are prompts: images of one are alike.

Names in shapes: R rows, I images, U units that are independent of each other.

Source of the interval: Student's t, widened by P. Hall, "On the Removal of Skewness by Transformation", JRSS B 54
(1992), Eq. 2.2 and its inverse, where the units lie askew. How often it holds: ``tests/benchmarks/coverage.py``.
"""

import math

import numpy as np
from scipy.stats import beta, skew, t

from d3po_core.records import ScoreSummary

CONFIDENCE = 0.95
# Of fewer units even a unanimous sign test (2 * 0.5^5 = 0.06) would not reach 5 %.
MIN_UNITS = 6
# So many units must be unlike the most common one: a few images that changed say nothing of how far others might.
MIN_UNLIKE = 5
# Samples more skewed than this come from distributions whose tail they have not shown yet.
STRONG_SKEW, SKEW_CONFIDENCE = 1.0, 0.98


def unit_means(scores: np.ndarray, prompts: list[str]) -> np.ndarray:
    """Means ``[..., U]`` of scores ``[..., I]`` over each prompt's images; of one prompt the scores themselves.

    Equal rows have equal means, to the last bit: a matrix product may round its last rows otherwise, and a checkpoint
    that draws the same images would be the better one.
    """
    if len(set(prompts)) == 1:
        return scores
    prompt_I, _ = units_of(prompts)
    counts_U = np.bincount(prompt_I)
    first_U = np.cumsum(counts_U) - counts_U
    return np.add.reduceat(scores[..., np.argsort(prompt_I, kind="stable")], first_U, axis=-1) / counts_U


def units_of(prompts: list[str]) -> tuple[np.ndarray, int]:
    """The unit of each image ``[I]`` and the number of units: its prompt, or the image itself when all have one."""
    distinct, prompt_I = np.unique(np.asarray(prompts, dtype=object), return_inverse=True)
    if len(distinct) == 1:
        return np.arange(len(prompts)), len(prompts)
    return prompt_I, len(distinct)


def mean_intervals(units: np.ndarray, shares: bool = False) -> list[ScoreSummary]:
    """Mean of each row of ``[R, U]`` with its 95 % interval; infinite ends when the units are too few to tell.

    Args:
        units: one number per unit.
        shares: whether every unit lies between 0 and 1. Too few of them still have an interval, Clopper-Pearson's: of
            all such numbers with their mean, whole ones spread most.
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
    """Mean over prompts of each row of ``[R, I]`` with its interval; scores of 0 and 1 are shares."""
    return mean_intervals(unit_means(scores, prompts), shares=bool(np.isin(scores, (0, 1)).all()))


def chance_of_as_high(units_U: np.ndarray, bound: float = 0.0) -> float:
    """One-sided p-value of Student's t for "the mean is at most ``bound``"; 1 when too few units differ from it."""
    above_U = units_U - bound
    if np.count_nonzero(above_U) < MIN_UNITS:
        return 1.0
    deviation = above_U.std(ddof=1)
    if deviation == 0:
        return float(above_U[0] < 0)
    return float(t.sf(above_U.mean() / deviation * np.sqrt(len(above_U)), len(above_U) - 1))


def share_interval(right: float, count: int) -> tuple[float, float]:
    """Clopper-Pearson 95 % interval of a share, exact for whole counts; 0 to 1 without any."""
    tail, wrong = (1 - CONFIDENCE) / 2, count - right
    low = float(beta.ppf(tail, right, wrong + 1)) if right > 0 else 0.0
    return low, float(beta.ppf(1 - tail, right + 1, wrong)) if wrong > 0 else 1.0


def _whole_shares(right: float, count: int) -> tuple[float, float]:
    return share_interval(math.floor(right), count)[0], share_interval(math.ceil(right), count)[1]


def _interval(units_U: np.ndarray) -> tuple[float, float]:
    """Both ends of the wider of Student's interval and Hall's, end by end."""
    count, mean = len(units_U), units_U.mean()
    error = units_U.std(ddof=1) / np.sqrt(count)
    half = t.ppf((1 + CONFIDENCE) / 2, count - 1)
    third = float(skew(units_U, bias=False))
    strong = abs(third) > STRONG_SKEW
    quantile = t.ppf((1 + SKEW_CONFIDENCE) / 2, (count - 1) / 2) if strong else half
    low, high = (mean - _unskewed(sign * quantile, third, count) * error for sign in (1, -1))
    return float(min(low, mean - half * error)), float(max(high, mean + half * error))


def _unskewed(quantile: float, third: float, count: int) -> float:
    """Hall's transformation, undone: the quantile of Student's statistic of units with this third moment."""
    bend = third / np.sqrt(count)
    if abs(bend) < 1e-8:
        return quantile
    return 3 / bend * (np.cbrt(1 + bend * (quantile - third / (6 * np.sqrt(count)))) - 1)
