"""Decisions from several people's votes against plain counting, closed forms, and raters of known accuracy."""

import functools
import itertools
import math
from collections import defaultdict
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.stats import binomtest

from d3po_core.errors import D3POError
from d3po_core.preferences.deciding import DECISIONS, decide, reliability
from d3po_core.preferences.deriving import derive_preferences
from d3po_core.preferences.gold import GoldScore, gold_scores, left_out
from d3po_core.store.tables import SCHEMAS, check_table
from tests.benchmarks.simulated_raters import (
    MODES,
    draw_groups,
    quality,
    simulate_votes,
    true_answers,
    vote,
    votes_table,
)
from tests.core.preferences.test_deriving import group_samples, in_round, said

METHODS = ("majority", "dawid_skene", "bradley_terry")
# Five raters, of whom the last one lies.
ACCURACIES = (0.9, 0.75, 0.65, 0.55, 0.2)

Rows = list[dict[str, Any]]


@st.composite
def ballots(draw: st.DrawFn) -> Rows:
    """Some votes of up to four people, and maybe gold, on pairs of up to three groups."""
    rows = []
    for group in range(draw(st.integers(1, 3))):
        for first, second in itertools.combinations(range(draw(st.integers(2, 4))), 2):
            for rater, kind in (*((f"rater{k}", "human") for k in range(4)), ("known", "gold")):
                answer = draw(st.sampled_from([None, None, -1, 0, 1] if kind == "gold" else [None, -1, 0, 1, 1]))
                if answer is not None:
                    rows.append(vote(f"g{group}", first, second, answer, rater, kind))
    return rows


def on_one_pair(answers: str, kind: str = "human") -> Rows:
    """Votes on one pair of images, a rater a sign: '+' for the first, '-' for the second, '0' for neither."""
    return [vote("g", 0, 1, "-0+".index(sign) - 1, f"{kind}{k}", kind) for k, sign in enumerate(answers)]


def decided(rows: Rows, combine: str = "majority", floor: float = 0.0, **options: Any) -> dict[str, dict[str, Any]]:
    """Decisions by pair, as 'g-m0>g-m1'."""
    table = decide(votes_table(rows), combine, floor, **options)
    return {f"{row['first_id']}>{row['second_id']}": row for row in table.to_pylist()}


def decided_after(table: pa.Table, groups: int) -> pa.Table:
    """Decisions without those of the first so many simulated groups."""
    return table.filter(pa.array([int(group[1:]) >= groups for group in table["group_id"].to_pylist()]))


def signed(decisions: dict[str, dict[str, Any]]) -> dict[str, float]:
    return {pair: row["outcome"] * row["weight"] for pair, row in decisions.items()}


@settings(max_examples=60)
@given(ballots())
def test_majority_equals_counting(rows: Rows) -> None:
    said_of = defaultdict(list)
    for row in rows:
        said_of[f"{row['first_id']}>{row['second_id']}"].append((row["rater_kind"], row["vote"]))
    found = decided(rows)
    assert found.keys() == said_of.keys()
    for pair, answers in said_of.items():
        people = [answer for kind, answer in answers if kind == "human"]
        gold = [answer for kind, answer in answers if kind == "gold"]
        expected = gold[0] if gold else sum(people) / len(people)
        assert signed(found)[pair] == pytest.approx(expected)
        assert found[pair]["num_raters"] == len(answers)
        if expected:
            votes = [answer for _, answer in answers]
            assert found[pair]["agreement"] == max(votes.count(1), votes.count(-1)) / len(votes)


@settings(max_examples=25)
@given(ballots(), st.sampled_from(METHODS), st.sampled_from([0.0, 0.6, 1.0]))
def test_decisions_are_always_fit_for_preferences(rows: Rows, combine: str, floor: float) -> None:
    table = decide(votes_table(rows), combine, floor)
    assert table.schema == DECISIONS
    for row in table.to_pylist():
        assert row["outcome"] in (-1, 0, 1)
        assert 0 < row["weight"] <= 1
        assert 0 < row["agreement"] <= 1
        assert row["num_raters"] >= 1


@settings(max_examples=20)
@given(ballots(), st.sampled_from(METHODS), st.randoms(use_true_random=False))
def test_the_order_of_the_votes_changes_nothing(rows: Rows, combine: str, random: Any) -> None:
    shuffled = random.sample(rows, len(rows))
    assert decide(votes_table(shuffled), combine, 0.6).equals(decide(votes_table(rows), combine, 0.6))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("combine", METHODS)
def test_the_other_order_of_the_members_gives_the_opposite_answer(combine: str, mode: str) -> None:
    rows = simulate_votes(draw_groups(12, 4, 0.5, 3), ACCURACIES, 4, mode).to_pylist()
    turned = [
        row | {"first_id": row["second_id"], "second_id": row["first_id"], "vote": -row["vote"],
               "first_member": 3 - row["second_member"], "second_member": 3 - row["first_member"]}
        for row in rows
    ]  # fmt: skip
    straight, opposite = signed(decided(rows, combine)), signed(decided(turned, combine))
    assert len(straight) == 72
    for pair, value in straight.items():
        first, _, second = pair.partition(">")
        assert opposite[f"{second}>{first}"] == pytest.approx(-value, abs=1e-6)


@pytest.mark.parametrize("combine", METHODS)
def test_names_of_raters_do_not_matter(combine: str) -> None:
    rows = simulate_votes(draw_groups(12, 4, 0.5, 3), ACCURACIES, 4).to_pylist()
    renamed = [row | {"rater": f"z{9 - int(row['rater'][-1])}"} for row in rows]
    assert signed(decided(renamed, combine)) == pytest.approx(signed(decided(rows, combine)), abs=1e-6)


@pytest.mark.parametrize("combine", METHODS)
def test_a_single_rater_is_believed(combine: str) -> None:
    rows = simulate_votes(draw_groups(8, 4, 0.5, 0), [0.8], 1).to_pylist()
    outcomes = {pair: row["outcome"] for pair, row in decided(rows, combine).items()}
    # Marks have no circles, so that no method has a reason to differ from what was said.
    assert outcomes == {f"{row['first_id']}>{row['second_id']}": row["vote"] for row in rows}


def test_a_unanimous_pair_weighs_one_and_an_even_one_is_a_tie() -> None:
    assert decided(on_one_pair("+++"))["g-m0>g-m1"]["weight"] == 1
    assert decided(on_one_pair("++-"))["g-m0>g-m1"]["weight"] == pytest.approx(1 / 3)
    assert decided(on_one_pair("+0"))["g-m0>g-m1"]["weight"] == pytest.approx(1 / 2)
    even = decided(on_one_pair("+-0"))["g-m0>g-m1"]
    assert (even["outcome"], even["weight"]) == (0, 1)


@pytest.mark.parametrize("combine", METHODS)
@pytest.mark.parametrize("answers", ["0", "00", "000", "+-", "++--", "+-0"])
def test_even_votes_are_a_tie(combine: str, answers: str) -> None:
    assert decided(on_one_pair(answers), combine)["g-m0>g-m1"]["outcome"] == 0


@pytest.mark.parametrize("answers", ["+", "-", "++", "++-", "+00", "++++-0", "-----"])
def test_bradley_terry_on_two_images_has_a_closed_form(answers: str) -> None:
    # Half a win for each side: p = (wins + 1/2) / (votes + 1), so 2p - 1 is the balance over votes + 1.
    balance = answers.count("+") - answers.count("-")
    found = signed(decided(on_one_pair(answers), "bradley_terry"))["g-m0>g-m1"]
    assert found == pytest.approx(balance / (len(answers) + 1), abs=1e-6)


def test_bradley_terry_equals_its_likelihood_maximised_by_scipy() -> None:
    random = np.random.default_rng(5)
    pairs = list(itertools.combinations(range(5), 2))
    answers = {(pair, k): int(random.integers(-1, 2)) for pair in pairs for k in range(4)}
    rows = [vote("g", *pair, answer, f"r{k}") for (pair, k), answer in answers.items()]

    def negative_log_likelihood(strength: np.ndarray) -> float:
        total = 0.0
        for a, b in pairs:
            gap, said = strength[a] - strength[b], [answers[(a, b), k] for k in range(4)]
            wins = said.count(1) + said.count(0) / 2 + 1 / 2
            losses = said.count(-1) + said.count(0) / 2 + 1 / 2
            total += wins * np.logaddexp(0, -gap) + losses * np.logaddexp(0, gap)
        return total

    best = minimize(negative_log_likelihood, np.zeros(5), tol=1e-10).x
    found = signed(decided(rows, "bradley_terry"))
    for a, b in pairs:
        if any(answers[(a, b), k] for k in range(4)):
            assert found[f"g-m{a}>g-m{b}"] == pytest.approx(math.tanh((best[a] - best[b]) / 2), abs=1e-4)


def test_bradley_terry_fits_what_was_never_compared_apart() -> None:
    # Two pairs of one group without a common image, and 40 more groups, each as if it were alone.
    rows = [vote("g", 0, 1, 1, "a"), vote("g", 2, 3, -1, "a"), vote("g", 2, 3, -1, "b")]
    rows += [vote(f"h{k}", 0, 1, 1, f"r{r}") for k in range(40) for r in range(k % 4 + 1)]
    found = signed(decided(rows, "bradley_terry"))
    assert found["g-m0>g-m1"] == pytest.approx(1 / 2, abs=1e-6)
    assert found["g-m2>g-m3"] == pytest.approx(-2 / 3, abs=1e-6)
    for k in range(40):
        votes = k % 4 + 1
        assert found[f"h{k}-m0>h{k}-m1"] == pytest.approx(votes / (votes + 1), abs=1e-6)


def plain_dawid_skene(rows: Rows, iterations: int = 30) -> dict[str, float]:
    """p(first) - p(second) by EM over dictionaries: mirrored pairs, 2 right and 1 wrong known answers a rater."""
    labels = sorted({row["vote"] for row in rows} | {-row["vote"] for row in rows})
    said = defaultdict(list)
    for row in rows:
        said[row["first_id"], row["second_id"]].append((row["rater"], row["vote"]))
        said[row["second_id"], row["first_id"]].append((row["rater"], -row["vote"]))
    raters = sorted({row["rater"] for row in rows})
    known = len(raters) * (len(labels) + 1)  # prior tasks of each true label: 2 right, 1 of each wrong
    p = {t: {c: sum(v == c for _, v in votes) / len(votes) for c in labels} for t, votes in said.items()}
    for _ in range(iterations):
        share = {c: (sum(p[t][c] for t in p) + known) / (len(p) + known * len(labels)) for c in labels}
        confusion = {(r, c, v): 2.0 if c == v else 1.0 for r in raters for c in labels for v in labels}
        for task, votes in said.items():
            for (r, v), c in itertools.product(votes, labels):
                confusion[r, c, v] += p[task][c]
        for task, votes in said.items():
            joint = {}
            for c in labels:
                joint[c] = share[c]
                for r, v in votes:
                    joint[c] *= confusion[r, c, v] / sum(confusion[r, c, w] for w in labels)
            p[task] = {c: joint[c] / sum(joint.values()) for c in labels}
    pairs = {(row["first_id"], row["second_id"]) for row in rows}
    return {f"{a}>{b}": p[a, b].get(1, 0.0) - p[a, b].get(-1, 0.0) for a, b in pairs}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("raters_per_group", [None, 3])
def test_dawid_skene_equals_plain_em(mode: str, raters_per_group: int | None) -> None:
    good_GM = draw_groups(10, 4, 0.5, 8)
    rows = simulate_votes(good_GM, ACCURACIES, 9, mode, raters_per_group).to_pylist()
    expected = plain_dawid_skene(rows)
    found = signed(decided(rows, "dawid_skene"))
    unsaid = {pair for pair in found if not any(r["vote"] for r in rows if f"{r['first_id']}>{r['second_id']}" == pair)}
    assert sum(abs(expected[pair]) > 0.5 for pair in found) > 10
    for pair in found.keys() - unsaid:
        assert found[pair] == pytest.approx(expected[pair], abs=1e-3)


def test_gold_decides_the_pairs_it_answers() -> None:
    rows = on_one_pair("-----") + on_one_pair("+", "gold")
    rows += [vote("h", 0, 1, 1, f"r{k}") for k in range(3)] + [vote("h", 0, 1, 0, "known", "gold")]
    for combine in METHODS:
        found = decided(rows, combine)
        assert (found["g-m0>g-m1"]["outcome"], found["g-m0>g-m1"]["weight"]) == (1, 1)
        assert found["h-m0>h-m1"]["outcome"] == 0


@pytest.mark.parametrize("combine", METHODS)
def test_gold_alone_is_a_decision(combine: str) -> None:
    assert signed(decided(on_one_pair("-", "gold"), combine)) == {"g-m0>g-m1": -1}


def test_gold_tells_dawid_skene_who_lies_when_most_do() -> None:
    good_GM = draw_groups(40, 4, 0.5, 2)
    truth = true_answers(good_GM)
    liars = (0.85, 0.15, 0.15)
    without = decide(simulate_votes(good_GM, liars, 3), "dawid_skene", 0.0)
    known = simulate_votes(good_GM, liars, 3, gold_groups=10)
    assert quality(without, truth)["right"] < 0.3
    others = decided_after(decide(known, "dawid_skene", 0.0), 10)  # gold decides the first ten groups itself
    assert quality(others, truth)["right"] > 0.8


def test_a_gold_question_is_a_group_and_a_tie_is_half_right() -> None:
    answers = (("g", 0, 1, 1), ("g", 0, 2, 1), ("g", 1, 2, 0), ("h", 0, 1, -1))
    gold = [vote(*answer, "known", "gold") for answer in answers]
    people = [vote("g", 0, 1, 1, "a"), vote("g", 0, 2, 0, "a"), vote("g", 1, 2, -1, "a"), vote("h", 0, 1, -1, "a"),
              vote("g", 0, 1, -1, "b"), vote("k", 0, 1, 1, "b")]  # fmt: skip
    assert gold_scores(votes_table(gold + people)) == {"a": GoldScore(2, 1.75), "b": GoldScore(1, 0.0)}


@pytest.mark.parametrize("mode", MODES)
def test_gold_scores_measure_accuracy_in_every_mode(mode: str) -> None:
    votes = simulate_votes(draw_groups(1500, 4, 0.5, 0), (0.9, 0.7, 0.5, 0.2), 1, mode, gold_groups=1500)
    scores = gold_scores(votes)
    for k, accuracy in enumerate((0.9, 0.7, 0.5, 0.2)):
        assert scores[f"rater{k}"].right / scores[f"rater{k}"].answered == pytest.approx(accuracy, abs=0.03)


@given(st.integers(0, 40), st.integers(1, 40))
def test_the_interval_of_whole_answers_is_the_exact_binomial_one(right: int, answered: int) -> None:
    right = min(right, answered)
    exact = binomtest(right, answered).proportion_ci(0.95, method="exact")
    assert GoldScore(answered, right).interval == pytest.approx((exact.low, exact.high))


def test_a_rater_is_left_out_only_when_the_answers_say_so_for_sure() -> None:
    gold = {"unknown": GoldScore(), "few": GoldScore(4, 0), "wrong": GoldScore(5, 0), "fair": GoldScore(20, 10),
            "poor": GoldScore(40, 14), "good": GoldScore(40, 36)}  # fmt: skip
    assert left_out(gold, 0.6) == ["poor", "wrong"]
    assert left_out(gold, 0.0) == []


def test_a_rater_at_the_floor_is_seldom_left_out_however_often_one_looks() -> None:
    """Looking at a 95 % interval after every answer leaves out some 11 %; here Ville's inequality promises 5 %."""
    right_RN = (np.random.default_rng(0).random((2000, 100)) < 0.6).cumsum(axis=1)
    ever = [
        any(left_out({"ann": GoldScore(n, float(right))}, 0.6) for n, right in enumerate(right_N, 1))
        for right_N in right_RN[:, :60]
    ]
    assert np.mean(ever) < 0.05
    assert np.mean(ever) > 0.005  # the rule does say something
    guessing = np.random.default_rng(1).random((400, 200)) < 0.4
    caught = [bool(left_out({"bob": GoldScore(200, float(answers.sum()))}, 0.6)) for answers in guessing]
    assert np.mean(caught) > 0.99


def test_evidence_against_a_rater_is_the_likelihood_averaged_below_the_floor() -> None:
    from scipy.integrate import quad

    for answered, right, floor in ((7, 3, 0.6), (20, 15, 0.6), (12, 4.5, 0.75)):
        wrong = answered - right
        average = quad(lambda p, r=right, w=wrong: p**r * (1 - p) ** w, 0, floor)[0] / floor
        expected = average / (floor**right * (1 - floor) ** wrong)
        assert GoldScore(answered, right).evidence_below(floor) == pytest.approx(expected)


def liar_on_gold(questions: int) -> Rows:
    """A liar and an honest rater on gold questions, and alone with each other on one more pair, g."""
    rows = []
    for k in range(questions):
        rows += [
            vote(f"q{k}", 0, 1, 1, "known", "gold"),
            vote(f"q{k}", 0, 1, -1, "liar"),
            vote(f"q{k}", 0, 1, 1, "honest"),
        ]
    return [*rows, vote("g", 0, 1, -1, "liar"), vote("g", 0, 1, 1, "honest"), vote("h", 0, 1, -1, "liar")]


@pytest.mark.parametrize("combine", METHODS)
def test_a_rater_below_the_floor_has_no_vote(combine: str) -> None:
    found = decided(liar_on_gold(5), combine, floor=0.6)
    assert (found["g-m0>g-m1"]["outcome"], found["g-m0>g-m1"]["num_raters"]) == (1, 1)
    assert "h-m0>h-m1" not in found  # nobody else judged it
    # With a vote, the liar is believed, or by Dawid-Skene turned around.
    alone = decided(liar_on_gold(5), combine, floor=0.0)["h-m0>h-m1"]
    assert alone["outcome"] == (1 if combine == "dawid_skene" else -1)


def test_too_few_gold_questions_leave_nobody_out_until_earlier_rounds_count() -> None:
    rows = liar_on_gold(2)
    assert decided(rows, floor=0.6)["g-m0>g-m1"]["outcome"] == 0
    earlier = {"liar": GoldScore(3, 0.0), "gone": GoldScore(9, 0.0)}
    assert decided(rows, floor=0.6, earlier_gold=earlier)["g-m0>g-m1"]["outcome"] == 1


@pytest.mark.parametrize("combine", METHODS)
def test_nothing_is_decided_without_votes(combine: str) -> None:
    assert decide(votes_table([]), combine, 0.6).equals(DECISIONS.empty_table())
    assert reliability(votes_table([])) == {}


def test_an_unknown_way_to_combine_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(D3POError, match=r"combine is 'vote'; expected one of majority, dawid_skene, bradley_terry"):
        decide(votes_table([]), "vote", 0.6)


@pytest.mark.parametrize("mode", MODES)
def test_reliability_estimates_the_accuracy_of_each_rater(mode: str) -> None:
    votes = simulate_votes(draw_groups(150, 4, 0.5, 0), ACCURACIES, 1, mode)
    found = reliability(votes)
    for k, accuracy in enumerate(ACCURACIES):
        assert found[f"rater{k}"] == pytest.approx(accuracy, abs=0.08)


def test_reliability_is_unknown_of_a_rater_who_judged_alone() -> None:
    rows = [*on_one_pair("++"), vote("h", 0, 1, 1, "alone")]
    assert reliability(votes_table(rows)).keys() == {"human0", "human1"}


@pytest.mark.parametrize("combine", METHODS)
def test_weights_reach_the_preferences(combine: str) -> None:
    judgements = [
        said(rater, "choice", "g0-m0", value, "g0-m1") for rater, value in (("a", 1.0), ("b", 1.0), ("c", -1.0))
    ]
    with duckdb.connect(":memory:") as connection:
        connection.register("samples", in_round("samples", group_samples("g0", 2), 4))
        connection.register("judgements", in_round("judgements", judgements, 4))
        by_people = functools.partial(decide, combine=combine, accuracy_floor=0.6)
        derived = derive_preferences(connection, 4, "pareto", "all", decide_people=by_people)
    check_table("preferences", derived.table.cast(SCHEMAS["preferences"]))
    (pair,) = derived.table.to_pylist()
    assert (pair["winner_id"], pair["loser_id"], pair["num_raters"]) == ("g0-m0", "g0-m1", 3)
    rows = [vote("g0", 0, 1, value, rater) for rater, value in (("a", 1), ("b", 1), ("c", -1))]
    assert pair["weight"] == pytest.approx(signed(decided(rows, combine))["g0-m0>g0-m1"])
    assert 0 < pair["weight"] < 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("raters_per_group", [None, 3])
def test_believing_the_right_raters_beats_the_majority(mode: str, raters_per_group: int | None) -> None:
    # 40 groups of 4, five raters of whom one lies, five seeds: share of ordered pairs decided right, and weighted.
    found = defaultdict(list)
    for seed in range(5):
        good_GM = draw_groups(40, 4, 0.5, seed)
        votes = simulate_votes(good_GM, ACCURACIES, seed + 100, mode, raters_per_group)
        for combine in ("majority", "dawid_skene"):
            found[combine].append(list(quality(decide(votes, combine, 0.0), true_answers(good_GM)).values()))
    difference_S2 = np.array(found["dawid_skene"]) - np.array(found["majority"])
    assert (difference_S2 > 0).all()
    assert difference_S2.mean(0).min() > 0.1


def test_gold_questions_make_the_majority_better() -> None:
    good_GM = draw_groups(80, 4, 0.5, 1)
    votes = simulate_votes(good_GM, ACCURACIES, 2, gold_groups=20)
    everybody, honest = (
        quality(decided_after(decide(votes, "majority", floor), 20), true_answers(good_GM)) for floor in (0.0, 0.6)
    )
    assert honest["right"] > everybody["right"] + 0.05
