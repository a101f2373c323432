"""Blind comparisons: which pairs are asked, what becomes of the answers, and the win rate that comes out."""

import random
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d3po_core.errors import D3POError
from d3po_core.evaluation.comparison import BETTER, UNCLEAR, WORSE, compare_scores
from d3po_core.intervals import mean_intervals
from d3po_core.page.queue import shown_order
from d3po_core.people.blind import (
    begin_comparison,
    collect_comparisons,
    comparison_deck,
    comparison_path,
    comparison_progress,
    comparisons_of,
)
from d3po_core.people.human_win_rate import human_win_rate, human_win_rates
from d3po_core.preferences.deriving import derive_preferences
from d3po_core.queries.views import connect_views
from d3po_core.store.tables import connect, read_rows
from tests.core.evaluation.compared import evaluated, say, say_all


@pytest.fixture
def campaign(tmp_path: Path) -> Path:
    return evaluated(tmp_path / "runs" / "x")


# ------------------------------------------------------------------------------------------- what is asked


def test_pairs_are_of_one_prompt_and_seed_and_spread_over_the_prompts(campaign: Path) -> None:
    found, missing = begin_comparison(campaign, 1, 0, pairs=12)
    assert missing == 0
    assert set(Counter(pair.prompt for pair in found.pairs).values()) == {1, 2}
    for pair in found.pairs:
        assert pair.sample_id.removeprefix("r1-") == pair.against_id.removeprefix("r0-")
        assert (pair.image_path, pair.against_path) == (
            f"images/round=1/{pair.sample_id}.png",
            f"images/round=0/{pair.against_id}.png",
        )


def test_asking_again_changes_nothing_and_asking_for_more_keeps_what_is_there(campaign: Path) -> None:
    first, _ = begin_comparison(campaign, 1, 0, pairs=5)
    content = comparison_path(campaign, 1, 0).read_bytes()
    assert begin_comparison(campaign, 1, 0, pairs=3).comparison == first
    assert comparison_path(campaign, 1, 0).read_bytes() == content
    more, _ = begin_comparison(campaign, 1, 0, pairs=1000, raters=2)
    assert more.pairs[:5] == first.pairs
    assert len({pair.sample_id for pair in more.pairs}) == len(more.pairs) == 24
    assert (more.id, more.raters) == (first.id, 2)
    assert comparisons_of(campaign) == [more]


def test_pairs_that_are_added_come_from_prompts_that_have_few(campaign: Path) -> None:
    begin_comparison(campaign, 1, 0, pairs=11)
    found, _ = begin_comparison(campaign, 1, 0, pairs=16)
    assert set(Counter(pair.prompt for pair in found.pairs).values()) == {2}


def test_which_image_a_pair_names_first_is_chance(tmp_path: Path) -> None:
    campaign = evaluated(tmp_path / "x", prompts=10, seeds=20)
    found, _ = begin_comparison(campaign, 1, 0, pairs=200, draw=random.Random(1))
    deck = comparison_deck(campaign, found)
    first = sum(question.sample_ids[0].startswith("r1-") for question in deck.questions)
    left = sum(shown_order(deck, "ann", question)[0].startswith("r1-") for question in deck.questions)
    for count in (first, left):  # five standard deviations
        assert 65 < count < 135
    # The order on the page is a function of what the page shows; it must not tell the order of a stored pair.
    turned = [shown_order(deck, "ann", q) != q.sample_ids for q in deck.questions]
    mine = [q.sample_ids[0].startswith("r1-") for q in deck.questions]
    assert 65 < sum(t == m for t, m in zip(turned, mine, strict=True)) < 135


def test_two_raters_see_a_pair_in_orders_of_their_own(tmp_path: Path) -> None:
    campaign = evaluated(tmp_path / "x", prompts=10, seeds=10)
    deck = comparison_deck(campaign, begin_comparison(campaign, 1, 0, pairs=100).comparison)
    same = sum(shown_order(deck, "ann", q) == shown_order(deck, "bob", q) for q in deck.questions)
    assert 25 < same < 75


def test_a_rejected_round_can_be_compared_and_any_round_be_the_reference(campaign: Path) -> None:
    found, _ = begin_comparison(campaign, 2, 1, pairs=4)
    assert {pair.sample_id[:3] + pair.against_id[:3] for pair in found.pairs} == {"r2-r1-"}


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((7, 0), "7 is no finished round of campaign 'x'; expected one of 0, 1, 2"),
        ((1, 7), "7 is no finished round"),
        ((1, 1), "cannot be compared with itself"),
        ((0, 1), "round 0 is the base model; expected a round that trained"),
    ],
)
def test_rounds_that_cannot_be_compared_are_one_line(campaign: Path, numbers: tuple[int, int], message: str) -> None:
    with pytest.raises(D3POError, match=message) as caught:
        begin_comparison(campaign, *numbers, pairs=4)
    assert "\n" not in str(caught.value)
    assert comparisons_of(campaign) == []


def test_pairs_without_an_image_are_left_out_and_counted_and_none_at_all_is_one_line(campaign: Path) -> None:
    (campaign / "images/round=0/r0-e0.png").unlink()
    (campaign / "images/round=1/r1-e5.png").unlink()
    found, missing = begin_comparison(campaign, 1, 0, pairs=48)
    assert (len(found.pairs), missing) == (22, 2)
    shutil.rmtree(campaign / "images/round=0")
    with pytest.raises(D3POError, match="share 24 held-out images, but of none are both on disk") as caught:
        begin_comparison(campaign, 2, 0, pairs=48)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(campaign: Path) -> None:
    begin_comparison(campaign, 1, 0, pairs=4)
    comparison_path(campaign, 1, 0).write_text('{"id": ')
    with pytest.raises(D3POError, match=r"1-0\.json: cannot be read") as caught:
        collect_comparisons(campaign)
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------- what was said


def test_answers_become_rows_that_say_which_image_stood_where(campaign: Path) -> None:
    found, _ = begin_comparison(campaign, 1, 0, pairs=8)
    said = [say(campaign, found, number, vote) for number, vote in enumerate((1, -1, 0, None))]
    (path,) = collect_comparisons(campaign)
    rows = read_rows(path)
    assert [row["value"] for row in rows] == [1.0, -1.0, 0.0, None]
    for row, entry, pair in zip(rows, said, found.pairs, strict=False):
        assert (row["sample_id"], row["against_id"], row["against"]) == (pair.sample_id, pair.against_id, 0)
        assert entry.shown[row["position"]] == pair.sample_id
        assert row["judged_at"] == entry.judged_at
    assert {row["seconds"] for row in rows} == {2.0, None}


def test_what_was_collected_is_not_collected_again(campaign: Path) -> None:
    found, _ = begin_comparison(campaign, 1, 0, pairs=8)
    assert collect_comparisons(campaign) == []
    say(campaign, found, 0, 1)
    (first,) = collect_comparisons(campaign)
    content = first.read_bytes()
    assert collect_comparisons(campaign) == []
    say(campaign, found, 1, 1)
    (second,) = collect_comparisons(campaign)
    assert first.read_bytes() == content
    assert len(read_rows(second)) == 1


def test_what_was_skipped_or_taken_back_says_nothing_and_the_last_word_counts(campaign: Path) -> None:
    found, _ = begin_comparison(campaign, 1, 0, pairs=8)
    first = say(campaign, found, 0, 1)
    say(campaign, found, 1, None)
    collect_comparisons(campaign)
    assert [rate.num_pairs for rate in human_win_rates(campaign)] == [1]
    say(campaign, found, 0, None, attempt=1, undoes=first.seq)
    collect_comparisons(campaign)
    assert human_win_rates(campaign) == []
    say(campaign, found, 0, -1, attempt=2)
    collect_comparisons(campaign)
    (rate,) = human_win_rates(campaign)
    assert (rate.num_pairs, rate.num_judgements, rate.win_rate.mean) == (1, 1, 0.0)


def test_a_comparison_never_reaches_judgements_votes_or_preferences(campaign: Path) -> None:
    def trained_on() -> list[tuple[object, ...]]:
        with connect_views(campaign) as asked:
            tables = ("judgements", "votes", "raters", "pairs")
            return [row for table in tables for row in asked.sql(f"SELECT * FROM {table} ORDER BY ALL").fetchall()]

    before = trained_on()
    with connect(campaign) as connection:
        derived = derive_preferences(connection, 1, "majority", "all").table
    found, _ = begin_comparison(campaign, 1, 0, pairs=24)
    say_all(campaign, found, lambda _: 1)
    collect_comparisons(campaign)
    assert human_win_rates(campaign)
    assert trained_on() == before
    with connect(campaign) as connection:
        again = derive_preferences(connection, 1, "majority", "all").table
    assert again.equals(derived)
    assert not [p for p in again["winner_id"].to_pylist() + again["loser_id"].to_pylist() if "-e" in p]


def test_progress_counts_pairs_that_have_their_raters(campaign: Path) -> None:
    found, _ = begin_comparison(campaign, 1, 0, pairs=3, raters=2)
    say_all(campaign, found, lambda _: 1)
    assert not comparison_progress(campaign, found).complete
    say_all(campaign, found, lambda _: 1, rater="bob")
    assert comparison_progress(campaign, found).complete


# ------------------------------------------------------------------------------------------- the win rate


def test_ties_are_half_and_raters_of_a_pair_are_one_voice(campaign: Path) -> None:
    found, _ = begin_comparison(campaign, 1, 0, pairs=8)  # a pair a prompt
    votes = [1, 1, 1, 0, 0, -1, 1, 1]
    say_all(campaign, found, lambda number: votes[number])
    say(campaign, found, 0, -1, rater="bob")
    collect_comparisons(campaign)
    (rate,) = human_win_rates(campaign)
    assert rate.win_rate.mean == pytest.approx((0.5 + 1 + 1 + 0.5 + 0.5 + 0 + 1 + 1) / 8)
    counts = (rate.num_units, rate.num_pairs, rate.num_judgements, rate.num_ties, rate.num_raters)
    assert counts == (8, 8, 9, 2, 2)


def test_interval_is_that_of_the_paired_comparison_of_scores(campaign: Path) -> None:
    found, _ = begin_comparison(campaign, 1, 0, pairs=24)
    votes = np.random.default_rng(3).choice([-1, 0, 1, 1], size=24)
    say_all(campaign, found, lambda number: float(votes[number]))
    collect_comparisons(campaign)
    (rate,) = human_win_rates(campaign)
    # Units in the order of the prompts' names: the bootstrap's resamples are then the same.
    expected = compare_scores(votes.astype(float), np.zeros(24), [pair.prompt for pair in found.pairs])
    assert rate.num_units == expected.num_units == 8
    assert rate.win_rate.mean == pytest.approx(expected.win_rate.mean)
    assert rate.win_rate.low == pytest.approx(expected.win_rate.low)
    assert rate.win_rate.high == pytest.approx(expected.win_rate.high)


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=30))
def test_interval_holds_the_rate_and_lies_within_0_and_1(shares: list[float]) -> None:
    (found,) = mean_intervals(np.array([shares]), shares=True)
    assert 0 <= found.low <= found.mean <= found.high <= 1


def test_a_few_unanimous_prompts_prove_little() -> None:
    won, lost = mean_intervals(np.stack([np.ones(6), np.zeros(6)]), shares=True)
    assert won.low == pytest.approx(0.025 ** (1 / 6))
    assert lost.high == pytest.approx(1 - 0.025 ** (1 / 6))
    (one,), (part,) = (mean_intervals(np.array([[share]]), shares=True) for share in (1.0, 0.7))
    assert one.low == pytest.approx(0.025)
    assert (part.low, part.high) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("vote", "pairs", "verdict"), [(1, 24, BETTER), (-1, 24, WORSE), (0, 24, UNCLEAR), (1, 5, UNCLEAR)]
)
def test_verdict_needs_an_interval_beside_one_half_and_prompts_enough(
    campaign: Path, vote: float, pairs: int, verdict: str
) -> None:
    found, _ = begin_comparison(campaign, 1, 0, pairs=pairs)
    say_all(campaign, found, lambda _: vote)
    collect_comparisons(campaign)
    (rate,) = human_win_rates(campaign)
    assert rate.verdict == verdict


def test_the_other_way_round_it_is_the_rest(campaign: Path) -> None:
    found, _ = begin_comparison(campaign, 2, 1, pairs=24)
    say_all(campaign, found, lambda number: 1 if number % 3 else -1)
    collect_comparisons(campaign)
    rates = human_win_rates(campaign)
    there, back = human_win_rate(rates, 2, 1), human_win_rate(rates, 1, 2)
    assert there is not None
    assert back is not None
    assert back.win_rate.mean == pytest.approx(1 - there.win_rate.mean)
    assert (back.win_rate.low, back.win_rate.high) == (1 - there.win_rate.high, 1 - there.win_rate.low)
    assert (there.reference, back.reference) == ("round 1", "round 2")
    assert human_win_rate(rates, 2, 0) is None
