"""What is said about raters, by hand on small campaigns and against definitions."""

import itertools
import math
import re
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, binomtest

from d3po_core.people.raters import (
    RaterReport,
    RaterSummary,
    earlier_gold,
    krippendorff_alpha,
    people_votes,
    rater_report,
    round_metrics,
)
from d3po_core.preferences.gold import GoldScore
from d3po_core.store.tables import connect, table_from_rows, write_table
from tests.core.preferences.test_deriving import MORNING, group_samples

FLOOR = 0.6
Judgements = list[dict[str, Any]]


def judged(rater: str, kind: str, sample_id: str, value: float | None, **changes: Any) -> dict[str, Any]:
    return {
        "rater": rater, "rater_kind": "human", "kind": kind, "sample_id": sample_id, "other_id": None, "value": value,
        "judged_at": MORNING, "source": "web", "seconds": None, "position": None,
    } | changes  # fmt: skip


def marks(rater: str, group: str, values: str, **changes: Any) -> Judgements:
    """A mark a member: '1' good, '0' bad, '-' no opinion."""
    return [
        judged(rater, "rating", f"{group}-m{member}", None if mark == "-" else float(mark), **changes)
        for member, mark in enumerate(values)
    ]


def campaign(folder: Path, rounds: dict[int, Judgements], groups: int = 4, size: int = 3) -> Path:
    """A folder with samples r<round>-g<n> and judgements of some rounds."""
    for number, judgements in rounds.items():
        samples = [s for g in range(groups) for s in group_samples(f"r{number}-g{g}", size)]
        write_table(folder, "samples", number, table_from_rows("samples", samples))
        write_table(folder, "judgements", number, table_from_rows("judgements", judgements), name="some")
    return folder


def report_of(folder: Path, round_number: int | None = None) -> RaterReport:
    with connect(folder) as connection:
        return rater_report(connection, FLOOR, round_number)


def by_name(report: RaterReport) -> dict[str, RaterSummary]:
    return {rater.rater: rater for rater in report.raters}


def test_counts_speed_and_skips(tmp_path: Path) -> None:
    first = marks("ann", "r1-g0", "110", seconds=4.0) + marks("ann", "r1-g1", "1--", seconds=1.0)
    second = marks("ann", "r2-g0", "011", seconds=9.0) + marks("bob", "r2-g0", "---")
    proxy = [judged("clip", "score", "r2-g0-m0", 0.5, rater_kind="proxy")]
    report = report_of(campaign(tmp_path, {1: first, 2: second + proxy}))
    ann, bob = by_name(report)["ann"], by_name(report)["bob"]
    assert [rater.rater for rater in report.raters] == ["ann", "bob"]
    assert (ann.judgements, ann.skips, ann.groups, ann.seconds) == (
        2,
        0,
        3,
        4.0,
    )  # one image alone is compared with none
    assert (bob.judgements, bob.skips, bob.groups, bob.seconds) == (0, 1, 0, None)
    assert (report.pairs, report.pairs_of_several, report.alpha, report.agreement) == (6, 0, None, None)
    of_second = by_name(report_of(tmp_path, 2))["ann"]
    assert (of_second.judgements, of_second.groups, of_second.seconds) == (1, 1, 9.0)


def test_groups_of_the_same_name_in_two_rounds_are_two(tmp_path: Path) -> None:
    for number in (1, 2):
        write_table(tmp_path, "samples", number, table_from_rows("samples", group_samples("g0", 2)))
        rows = marks("ann", "g0", "10") + marks("bob", "g0", "10" if number == 1 else "01")
        write_table(tmp_path, "judgements", number, table_from_rows("judgements", rows))
    report = report_of(tmp_path)
    assert (report.pairs, report.agreement) == (2, 0.5)
    assert by_name(report)["ann"].groups == 2


def test_the_last_word_is_the_one_that_agrees(tmp_path: Path) -> None:
    later = {"judged_at": MORNING + timedelta(hours=1), "source": "again"}
    rows = marks("ann", "r1-g0", "110") + marks("bob", "r1-g0", "001") + marks("bob", "r1-g0", "110", **later)
    report = report_of(campaign(tmp_path, {1: rows}))
    assert (report.agreement, report.alpha) == (1.0, 1.0)
    assert (by_name(report)["bob"].judgements, by_name(report)["bob"].taken_back) == (1, 0)


def test_agreement_counts_equal_votes_on_the_same_pairs(tmp_path: Path) -> None:
    # Votes on (0,1), (0,2), (1,2): ann + + 0, bob + 0 -, cat says nothing of image 2.
    rows = marks("ann", "r1-g0", "100") + marks("bob", "r1-g0", "101") + marks("cat", "r1-g0", "10-")
    rows += marks("dan", "r1-g1", "100")
    report = report_of(campaign(tmp_path, {1: rows}))
    raters = by_name(report)
    assert raters["ann"].agreement == pytest.approx(2 / 4)  # (0,1) with bob and cat, neither of the others with bob
    assert raters["bob"].agreement == pytest.approx(2 / 4)
    assert raters["cat"].agreement == 1.0
    assert raters["dan"].agreement is None
    assert raters["dan"].reliability is None
    assert report.agreement == pytest.approx(3 / 5)
    assert (report.pairs, report.pairs_of_several) == (6, 3)


def choices(rater: str, answers: list[tuple[float | None, int | None]]) -> Judgements:
    """(value, position of sample_id) of choices between two images, a group each."""
    return [
        judged(rater, "choice", f"r1-g{g}-m0", value, other_id=f"r1-g{g}-m1", position=position)
        for g, (value, position) in enumerate(answers)
    ]


def test_position_bias_is_the_share_of_choices_for_the_first_place(tmp_path: Path) -> None:
    first = [(1.0, 0), (-1.0, 1), (1.0, 0), (-1.0, 1), (1.0, 0), (-1.0, 1), (1.0, 0)]
    second = [(1.0, 1), (-1.0, 0)]
    not_counted = [(0.0, 0), (None, 0), (1.0, None)]
    rows = choices("ann", first + second + not_counted) + choices("bob", not_counted)
    raters = by_name(report_of(campaign(tmp_path, {1: rows}, groups=12, size=2)))
    ann = raters["ann"]
    assert (ann.placed, ann.first_share) == (9, pytest.approx(7 / 9))
    # Two-sided: as far from one half as 7 or more of 9, or 2 or fewer.
    assert ann.first_p == pytest.approx(2 * binom.cdf(2, 9, 0.5))
    exact = binomtest(7, 9).proportion_ci(0.95)
    assert (ann.first_low, ann.first_high) == pytest.approx((exact.low, exact.high))
    assert (raters["bob"].placed, raters["bob"].first_share, raters["bob"].first_p) == (0, None, None)


def gold_round(number: int, questions: int, **people: str) -> Judgements:
    """Gold questions with the order 1 0 0, and what each person marked in all of them."""
    rows = []
    for g in range(questions):
        rows += marks("known", f"r{number}-g{g}", "100", rater_kind="gold")
        for rater, values in people.items():
            rows += marks(rater, f"r{number}-g{g}", values)
    return rows


def test_gold_scores_add_up_over_rounds_and_leave_a_liar_out(tmp_path: Path) -> None:
    rounds = {n: gold_round(n, 3, ann="100", liar="011", half="110") for n in (1, 2, 3)}
    campaign(tmp_path, rounds)
    raters = by_name(report_of(tmp_path))
    assert (raters["ann"].gold_answered, raters["ann"].gold_right, raters["ann"].left_out) == (9, 9.0, False)
    assert raters["ann"].gold_high == 1.0
    assert (raters["liar"].gold_right, raters["liar"].gold_low, raters["liar"].left_out) == (0.0, 0.0, True)
    assert (raters["half"].gold_right, raters["half"].left_out) == (6.75, False)  # a tie, and one right, a question
    assert not by_name(report_of(tmp_path, 1))["liar"].left_out  # three answers tell too little
    assert by_name(report_of(tmp_path, 3))["liar"].gold_answered == 9
    with connect(tmp_path) as connection:
        assert earlier_gold(connection, 1) == {}
        assert earlier_gold(connection, 3)["liar"] == GoldScore(6, 0.0)


def test_reliability_tells_the_liar(tmp_path: Path) -> None:
    patterns = ["100", "010", "001", "110"]
    rows = []
    for g, pattern in enumerate(patterns):
        for rater in ("ann", "bob", "cat"):
            rows += marks(rater, f"r1-g{g}", pattern)
        rows += marks("liar", f"r1-g{g}", pattern.translate(str.maketrans("01", "10")))
    raters = by_name(report_of(campaign(tmp_path, {1: rows})))
    assert raters["ann"].reliability > 0.9
    assert raters["liar"].reliability < 0.1


def test_gold_is_no_rater_and_no_partner_of_agreement(tmp_path: Path) -> None:
    report = report_of(campaign(tmp_path, {1: gold_round(1, 2, ann="011")}))
    assert [rater.rater for rater in report.raters] == ["ann"]
    assert (report.agreement, report.pairs_of_several) == (None, 0)


def test_a_campaign_that_nobody_judged_has_an_empty_report(tmp_path: Path) -> None:
    proxy = [judged("clip", "score", "r1-g0-m0", 0.5, rater_kind="proxy")]
    for folder in (tmp_path / "none", campaign(tmp_path / "proxies", {1: proxy})):
        assert report_of(folder) == RaterReport((), None, None, 0, 0)
        with connect(folder) as connection:
            assert round_metrics(connection, 1, FLOOR) == {}
            assert earlier_gold(connection, 2) == {}


def plain_alpha(votes_RP: np.ndarray) -> float:
    """1 - observed / expected disagreement, by counting pairs of values within mirrored units and overall."""
    units = [
        [sign * vote for vote in column if not math.isnan(vote)] for column in votes_RP.T.tolist() for sign in (1, -1)
    ]
    units = [unit for unit in units if len(unit) > 1]
    values = [value for unit in units for value in unit]
    observed = sum(
        (a - b) ** 2 / (len(unit) - 1) for unit in units for a, b in itertools.permutations(unit, 2)
    ) / len(values)  # fmt: skip
    apart = [(a - b) ** 2 for a, b in itertools.permutations(values, 2)]
    return 1 - observed / (sum(apart) / len(apart))


@settings(max_examples=60)
@given(
    st.integers(1, 6).flatmap(
        lambda pairs: st.lists(
            st.lists(st.sampled_from([-1.0, 0.0, 1.0, math.nan]), min_size=pairs, max_size=pairs),
            min_size=1,
            max_size=4,
        )
    )
)
def test_alpha_equals_its_definition(votes: list[list[float]]) -> None:
    votes_RP = np.array(votes)
    several = votes_RP[:, (~np.isnan(votes_RP)).sum(0) > 1]
    if not np.nansum(np.abs(several)):
        assert krippendorff_alpha(votes_RP) is None
    else:
        assert krippendorff_alpha(votes_RP) == pytest.approx(plain_alpha(votes_RP))


def test_alpha_is_one_for_equal_votes_and_none_for_chance() -> None:
    random = np.random.default_rng(0)
    assert krippendorff_alpha(np.ones((3, 5))) == 1.0  # also when all votes are for the first
    assert krippendorff_alpha(random.integers(-1, 2, (4, 3000)).astype(float)) == pytest.approx(0, abs=0.03)
    opposite = np.array([[1.0, -1.0] * 50, [-1.0, 1.0] * 50])
    assert krippendorff_alpha(opposite) == pytest.approx(-1, abs=0.02)


def test_votes_of_all_rounds_equal_those_of_each(tmp_path: Path) -> None:
    rounds = {n: marks("ann", f"r{n}-g0", "100") + marks("bob", f"r{n}-g1", "0-1") for n in (1, 2)}
    with connect(campaign(tmp_path, rounds)) as connection:
        votes = people_votes(connection).to_pylist()
        assert people_votes(connection, last_round=1).num_rows == len(votes) // 2
    found = {(v["group_id"], v["first_id"], v["second_id"], v["rater"], v["vote"]) for v in votes}
    assert ("1/r1-g0", "1/r1-g0-m0", "1/r1-g0-m1", "ann", 1) in found
    assert ("2/r2-g1", "2/r2-g1-m0", "2/r2-g1-m2", "bob", -1) in found
    assert len(found) == len(votes) == 8


def test_round_metrics_are_flat_finite_numbers_that_mlflow_takes(tmp_path: Path) -> None:
    people = {"ann@home": "100", "ann home": "100", "liar": "011"}
    campaign(tmp_path, {n: gold_round(n, 3, **people) for n in (1, 2)})
    with connect(tmp_path) as connection:
        metrics = round_metrics(connection, 2, FLOOR)
    assert all(type(value) is float and math.isfinite(value) for value in metrics.values())
    assert all(re.fullmatch(r"[A-Za-z0-9_/-]+", name) for name in metrics)
    assert metrics["raters/count"] == 3
    assert metrics["raters/left_out"] == 1
    assert metrics["raters/pairs_of_several"] == 9
    assert metrics["rater/liar/gold_answered"] == 6
    assert metrics["rater/liar/left_out"] == 1
    assert metrics["rater/ann_home/judgements"] == metrics["rater/ann_home-2/judgements"] == 3
    assert "rater/liar/seconds" not in metrics


def test_times_may_carry_any_date(tmp_path: Path) -> None:
    rows = marks("ann", "r1-g0", "10-", judged_at=datetime(1999, 12, 31))
    assert by_name(report_of(campaign(tmp_path, {1: rows})))["ann"].judgements == 1
