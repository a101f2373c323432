"""Intervals hold as often as they say, for few prompts and skewed scores too, or there is none."""

import math

import numpy as np
import pytest
from scipy.stats import binomtest, t

from d3po_core.intervals import chance_of_as_high, mean_intervals, score_intervals, unit_means
from d3po_core.records import ScoreSummary


def covered(units: np.ndarray, mean: float, shares: bool = False) -> tuple[float, float]:
    """How often a told interval holds the mean, and how often there is one."""
    found = mean_intervals(units, shares)
    told = [f for f in found if None not in f.ends]
    return float(np.mean([f.low <= mean <= f.high for f in told])) if told else math.nan, len(told) / len(found)


def shares_of(rng: np.random.Generator, count: int, images: int) -> np.ndarray:
    """Mean shares of prompts of which each has a chance of its own, 0.8 on average."""
    return rng.binomial(images, rng.beta(1.6, 0.4, (1000, count))) / images


RNG = np.random.default_rng(0)
HELD = {  # units of 1,000 campaigns, their true mean, whether they are shares
    "6 normal prompts": (RNG.normal(size=(1000, 6)), 0.0, False),
    "18 normal prompts": (RNG.normal(size=(1000, 18)), 0.0, False),
    "18 prompts of 8 images that differ": (shares_of(RNG, 18, 8), 0.8, True),
    "8 prompts of one image each": ((RNG.random((1000, 8)) < 0.8).astype(float), 0.8, True),
    "18 lognormal prompts": (RNG.lognormal(size=(1000, 18)), math.exp(0.5), False),
    "32 lognormal prompts": (RNG.lognormal(size=(1000, 32)), math.exp(0.5), False),
}


@pytest.mark.parametrize("case", HELD)
def test_interval_covers_the_mean_over_prompts(case: str) -> None:
    share, told = covered(*HELD[case])
    assert share > 0.93  # nominal 0.95, standard error 0.007
    assert told > 0.95


def test_few_changed_images_say_nothing_of_other_prompts() -> None:
    """Of 6 prompts with 8 images 3 % better and 1 % worse: most look unchanged, and the bootstrap covered 0.79."""
    changed = RNG.choice([1.0, 0, -1], p=[0.03, 0.96, 0.01], size=(1000, 6, 8)).mean(axis=2)
    _, told = covered(changed, 0.02)
    assert told < 0.02


def test_interval_of_units_that_lie_straight_is_students() -> None:
    units_U = np.concatenate([np.arange(-9.5, 0), np.arange(0.5, 10)]) + 3
    (found,) = mean_intervals(units_U[None])
    half = t.ppf(0.975, 19) * units_U.std(ddof=1) / np.sqrt(20)
    assert (found.low, found.high) == pytest.approx((3 - half, 3 + half))


def test_one_prompt_or_image_has_no_interval() -> None:
    for prompts, scores in ((["a"], [[0.558]]), (["a", "b", "c"], [[0.1, 0.2, 0.9]])):
        (found,) = score_intervals(np.array(scores), prompts)
        assert found.ends == (None, None)
        assert str(found).endswith("[too few to tell]")


def test_shares_that_are_all_right_have_the_exact_interval() -> None:
    prompts = [f"p{n}" for n in range(18) for _ in range(4)]
    (found,) = score_intervals(np.ones((1, 72)), prompts)
    assert found.low == pytest.approx(binomtest(18, 18).proportion_ci(0.95, "exact").low)
    assert found.high == 1


def test_images_of_a_prompt_are_one_unit() -> None:
    per_prompt = np.random.default_rng(2).normal(size=12)
    names = [f"p{n}" for n in range(12)]
    (once,) = score_intervals(per_prompt[None], names)
    (copied,) = score_intervals(np.repeat(per_prompt, 5)[None], [name for name in names for _ in range(5)])
    assert copied.model_dump() == pytest.approx(once.model_dump())


def test_chance_is_students_and_needs_six_prompts_that_differ() -> None:
    units_U = np.random.default_rng(3).normal(0.4, 1, 20)
    from scipy.stats import ttest_1samp

    assert chance_of_as_high(units_U, 0.1) == pytest.approx(ttest_1samp(units_U, 0.1, alternative="greater").pvalue)
    assert chance_of_as_high(np.array([1.0] * 5 + [0] * 15)) == 1
    assert chance_of_as_high(np.ones(6)) == 0
    assert chance_of_as_high(-np.ones(6)) == 1


def test_a_summary_without_interval_survives_its_record() -> None:
    nothing = ScoreSummary(mean=0.5, low=-math.inf, high=math.inf)
    assert ScoreSummary.model_validate_json(nothing.model_dump_json()) == nothing
    assert nothing.signed == "+0.500 [too few to tell]"


def test_unit_means_of_one_prompt_are_its_images() -> None:
    scores = np.array([[1.0, 3, 5]])
    assert unit_means(scores, ["a"] * 3).tolist() == scores.tolist()
