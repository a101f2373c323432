"""Preferences derived by SQL against a few lines of numpy, and each kind of judgement by hand."""

import itertools
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d3po_core.preferences.deriving import Preferences, derive_preferences
from d3po_core.store.tables import SCHEMAS, check_table, table_from_rows

ROUND = 4
MORNING = datetime(2024, 5, 1, 8)


def said(
    rater: str, kind: str, sample_id: str, value: float, other_id: str | None = None, minute: int = 0, **changes: Any
) -> dict[str, Any]:
    return {
        "rater": rater, "rater_kind": "human", "kind": kind, "sample_id": sample_id, "other_id": other_id,
        "value": value, "judged_at": MORNING + timedelta(minutes=minute), "source": "web",
        "seconds": None, "position": None,
    } | changes  # fmt: skip


def group_samples(group: str, size: int) -> list[dict[str, Any]]:
    return [
        {
            "sample_id": f"{group}-m{member}", "group_id": group, "member": member, "prompt": "p", "split": "train",
            "seed": 0, "image_path": "i", "trajectory_path": "t", "trajectory_row": member, "checkpoint": None,
        }
        for member in range(size)
    ]  # fmt: skip


def in_round(table: str, rows: list[dict[str, Any]], number: int) -> pa.Table:
    data = table_from_rows(table, rows)
    return data.append_column("round", pa.array([number] * len(data), pa.int64()))


def derive(
    sizes: dict[str, int],
    judgements: list[dict[str, Any]],
    combine: str = "pareto",
    pairs: str = "all",
    elsewhere: list[dict[str, Any]] | None = None,
    **options: Any,
) -> Preferences:
    """Derive from judgements of round 4; ``elsewhere`` are judgements of round 3 over samples of the same names."""
    samples = [sample for group, size in sizes.items() for sample in group_samples(group, size)]
    with duckdb.connect(":memory:") as connection:
        tables = {
            "samples": [in_round("samples", samples, number) for number in (3, ROUND)],
            "judgements": [in_round("judgements", judgements, ROUND), in_round("judgements", elsewhere or [], 3)],
        }
        for name, parts in tables.items():
            connection.register(name, pa.concat_tables(parts))
        derived = derive_preferences(connection, ROUND, combine, pairs, **options)
        assert connection.execute("SELECT count(*) FROM judgements WHERE round = 4").fetchone() == (len(judgements),)
    check_table("preferences", derived.table.cast(SCHEMAS["preferences"]))
    return derived


def outcome(derived: Preferences) -> list[tuple[str, str]]:
    """(winner, loser) of every pair, without the group's name."""
    return [
        (row["winner_id"].rpartition("-")[2], row["loser_id"].rpartition("-")[2]) for row in derived.table.to_pylist()
    ]


def scores_of(group: str, rater: str, values: Iterable[float], kind: str = "score") -> list[dict[str, Any]]:
    return [said(rater, kind, f"{group}-m{member}", float(value)) for member, value in enumerate(values)]


@st.composite
def scored_groups(draw: st.DrawFn) -> dict[str, np.ndarray]:
    """Scores ``[members, K raters]`` of up to three groups, coarse so that ties are common."""
    raters = draw(st.integers(1, 4))
    values = st.integers(0, 3)
    return {
        f"g{index}": np.array(
            draw(st.lists(st.lists(values, min_size=raters, max_size=raters), min_size=2, max_size=5))
        )
        for index in range(draw(st.integers(1, 3)))
    }


def judgements_of(groups: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    return [
        judgement
        for group, scores in groups.items()
        for k in range(scores.shape[1])
        for judgement in scores_of(group, f"rater{k}", scores[:, k])
    ]


@settings(max_examples=30)
@given(scored_groups())
def test_pareto_equals_dominance_in_numpy(groups: dict[str, np.ndarray]) -> None:
    derived = derive({group: len(scores) for group, scores in groups.items()}, judgements_of(groups))
    names, pairs_B2K = [], []
    for group, scores in groups.items():
        for a, b in itertools.combinations(range(len(scores)), 2):
            names.append((group, a, b))
            pairs_B2K.append(scores[[a, b]])
    stacked_B2K = np.stack(pairs_B2K)
    better_B = (stacked_B2K[:, 0] >= stacked_B2K[:, 1]).all(1) & (stacked_B2K[:, 0] > stacked_B2K[:, 1]).any(1)
    worse_B = (stacked_B2K[:, 1] >= stacked_B2K[:, 0]).all(1) & (stacked_B2K[:, 1] > stacked_B2K[:, 0]).any(1)
    expected = set()
    for (group, a, b), better, worse in zip(names, better_B, worse_B, strict=True):
        if better or worse:
            winner, loser = (a, b) if better else (b, a)
            expected.add((group, f"{group}-m{winner}", f"{group}-m{loser}"))
    rows = derived.table.to_pylist()
    assert {(row["group_id"], row["winner_id"], row["loser_id"]) for row in rows} == expected
    assert len(rows) == len(expected)
    assert derived.num_ties == len(names) - len(expected)


@settings(max_examples=30)
@given(scored_groups())
def test_majority_equals_counting_in_numpy(groups: dict[str, np.ndarray]) -> None:
    derived = derive({group: len(scores) for group, scores in groups.items()}, judgements_of(groups), "majority")
    expected = {}
    for group, scores in groups.items():
        for a, b in itertools.permutations(range(len(scores)), 2):
            for_a, for_b = (scores[a] > scores[b]).sum(), (scores[b] > scores[a]).sum()
            if for_a > for_b:
                expected[f"{group}-m{a}", f"{group}-m{b}"] = (scores.shape[1], int(for_a))
    found = {
        (row["winner_id"], row["loser_id"]): (row["num_raters"], round(row["agreement"] * row["num_raters"], 9))
        for row in derived.table.to_pylist()
    }
    assert found == expected


@settings(max_examples=30)
@given(scored_groups(), st.sampled_from(("pareto", "majority")))
def test_best_worst_is_the_pair_of_most_and_fewest_wins(groups: dict[str, np.ndarray], combine: str) -> None:
    sizes = {group: len(scores) for group, scores in groups.items()}
    every = derive(sizes, judgements_of(groups), combine)
    chosen = derive(sizes, judgements_of(groups), combine, "best_worst")
    won = {(row["winner_id"], row["loser_id"]) for row in every.table.to_pylist()}
    expected = set()
    for group, size in sizes.items():
        standing = [
            sum((f"{group}-m{m}", f"{group}-m{n}") in won for n in range(size))
            - sum((f"{group}-m{n}", f"{group}-m{m}") in won for n in range(size))
            for m in range(size)
        ]
        best, worst = standing.index(max(standing)), standing.index(min(standing))
        ends = {(f"{group}-m{best}", f"{group}-m{worst}"), (f"{group}-m{worst}", f"{group}-m{best}")}
        expected |= ends & won
    assert {(row["winner_id"], row["loser_id"]) for row in chosen.table.to_pylist()} == expected
    assert chosen.num_ties == every.num_ties


def test_objectives_are_never_mixed() -> None:
    # Published bug 5: comparing flattened columns. Here each member is better in one objective: nobody dominates.
    derived = derive({"g": 2}, scores_of("g", "sharp", [9, 1]) + scores_of("g", "bright", [0.1, 0.2]))
    assert outcome(derived) == []
    assert derived.num_ties == 1


@pytest.mark.parametrize("kind", ["score", "rating"])
def test_higher_score_or_rating_wins(kind: str) -> None:
    assert outcome(derive({"g": 3}, scores_of("g", "ann", [2, 5, 3], kind))) == [
        ("m1", "m0"),
        ("m2", "m0"),
        ("m1", "m2"),
    ]


def test_lower_rank_wins() -> None:
    assert outcome(derive({"g": 3}, scores_of("g", "ann", [2, 1, 2], "rank"))) == [("m1", "m0"), ("m1", "m2")]


@pytest.mark.parametrize(
    ("sample", "other", "value", "expected"),
    [
        ("g-m0", "g-m1", 1, [("m0", "m1")]),
        ("g-m0", "g-m1", -1, [("m1", "m0")]),
        ("g-m1", "g-m0", 1, [("m1", "m0")]),
        ("g-m1", "g-m0", -1, [("m0", "m1")]),
        ("g-m1", "g-m0", 0, []),
    ],
)
def test_choice_votes_for_the_chosen_side(
    sample: str, other: str, value: float, expected: list[tuple[str, str]]
) -> None:
    derived = derive({"g": 2}, [said("ann", "choice", sample, value, other)])
    assert outcome(derived) == expected
    assert derived.num_ties == (0 if expected else 1)


def test_choice_says_nothing_of_pairs_that_were_not_shown() -> None:
    derived = derive({"g": 3}, [said("ann", "choice", "g-m0", 1, "g-m2")])
    assert outcome(derived) == [("m0", "m2")]
    assert derived.num_ties == 0


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_later_judgement_replaces_the_earlier_of_the_same_rater(order: list[int]) -> None:
    first = said("ann", "rating", "g-m0", 1, minute=0)
    second = said("ann", "rating", "g-m0", 5, minute=9)
    other = said("ann", "rating", "g-m1", 3, minute=5)
    both = [[first, second][i] for i in order]
    assert outcome(derive({"g": 2}, [*both, other])) == [("m0", "m1")]
    assert outcome(derive({"g": 2}, [first, other])) == [("m1", "m0")]


def test_later_choice_replaces_the_earlier_also_with_sides_swapped() -> None:
    first = said("ann", "choice", "g-m0", 1, "g-m1", minute=0)
    second = said("ann", "choice", "g-m1", 1, "g-m0", minute=1)
    derived = derive({"g": 2}, [first, second])
    assert outcome(derived) == [("m1", "m0")]
    assert derived.table["num_raters"].to_pylist() == [1]


def test_another_raters_judgement_replaces_nothing() -> None:
    rows = scores_of("g", "ann", [5, 1]) + scores_of("g", "bob", [1, 5]) + scores_of("g", "eve", [5, 1])
    assert outcome(derive({"g": 2}, rows)) == []
    derived = derive({"g": 2}, rows, "majority")
    assert outcome(derived) == [("m0", "m1")]
    assert derived.table["num_raters"].to_pylist() == [3]
    assert derived.table["agreement"].to_pylist() == [pytest.approx(2 / 3)]


def test_judgements_of_another_round_do_not_count() -> None:
    derived = derive({"g": 2}, scores_of("g", "ann", [5, 1]), elsewhere=scores_of("g", "bob", [1, 5]))
    assert outcome(derived) == [("m0", "m1")]
    assert derived.table["num_raters"].to_pylist() == [1]


def test_members_of_different_groups_are_never_paired() -> None:
    rows = [*scores_of("g", "ann", [5]), *scores_of("h", "ann", [1]), said("bob", "choice", "g-m0", 1, "h-m1")]
    derived = derive({"g": 2, "h": 2}, rows)
    assert outcome(derived) == []
    assert derived.num_ties == 0


def test_image_that_nobody_judged_is_in_no_pair() -> None:
    derived = derive({"g": 3}, [said("ann", "rating", "g-m0", 5), said("ann", "rating", "g-m2", 1)])
    assert outcome(derived) == [("m0", "m2")]
    assert derived.num_ties == 0


def test_marked_images_lose_to_unmarked_and_have_no_order_among_themselves() -> None:
    # Section 5.2: seven images, some marked as deformed.
    marks = [1, 0, 1, 1, 0, 1, 1]
    derived = derive({"g": 7}, scores_of("g", "ann", marks, "rating"))
    expected = {(f"m{a}", f"m{b}") for a in range(7) for b in range(7) if marks[a] > marks[b]}
    assert set(outcome(derived)) == expected
    assert len(expected) == 10
    assert derived.num_ties == 21 - 10


def test_no_judgements_give_no_pairs() -> None:
    for pairs in ("all", "best_worst"):
        derived = derive({"g": 4}, [], pairs=pairs)
        assert len(derived.table) == 0
        assert derived.num_ties == 0


def test_pair_names_winner_and_loser_and_is_unique() -> None:
    derived = derive(
        {"r4-g0": 3, "r4-g1": 3}, scores_of("r4-g0", "ann", [1, 2, 3]) + scores_of("r4-g1", "ann", [3, 2, 1])
    )
    assert derived.table["pair_id"].to_pylist() == [
        "r4-g0-1>0", "r4-g0-2>0", "r4-g0-2>1", "r4-g1-0>1", "r4-g1-0>2", "r4-g1-1>2",
    ]  # fmt: skip
    assert set(derived.table["weight"].to_pylist()) == {1.0}


def test_result_does_not_depend_on_the_order_of_the_rows() -> None:
    scores = np.random.default_rng(0).integers(0, 3, (6, 3))
    rows = judgements_of({"g": scores})
    shuffled = [rows[i] for i in np.random.default_rng(1).permutation(len(rows))]
    for pairs in ("all", "best_worst"):
        assert derive({"g": 6}, rows, "majority", pairs).table.equals(
            derive({"g": 6}, shuffled, "majority", pairs).table
        )


def test_skipped_or_withdrawn_judgement_votes_for_nothing_and_replaces_the_earlier() -> None:
    skipped = [said("ann", "choice", "g-m0", None, "g-m1")]  # type: ignore[arg-type]
    assert derive({"g": 2}, skipped).table.num_rows == 0
    withdrawn = [said("ann", "rating", "g-m0", 1), said("ann", "rating", "g-m1", 0),
                 said("ann", "rating", "g-m0", None, minute=1)]  # type: ignore[arg-type]  # fmt: skip
    assert derive({"g": 2}, withdrawn).table.num_rows == 0


def test_rater_who_judged_in_two_ways_has_one_vote() -> None:
    both = [
        said("ann", "rating", "g-m0", 1),
        said("ann", "rating", "g-m1", 0),
        said("ann", "choice", "g-m0", 1, "g-m1"),
    ]
    table = derive({"g": 2}, both).table.to_pylist()
    assert [(row["num_raters"], row["agreement"]) for row in table] == [(1, 1.0)]


def test_people_decide_the_groups_they_judged_and_proxies_the_others() -> None:
    proxies = [said("p", "score", f"{group}-m{m}", m, rater_kind="proxy") for group in ("g", "h") for m in range(2)]
    ann = [said("ann", "choice", "g-m0", 1, "g-m1")]
    assert sorted(derive({"g": 2, "h": 2}, proxies + ann).table["pair_id"].to_pylist()) == ["g-0>1", "h-1>0"]


def test_proxies_may_be_kept_from_deciding() -> None:
    proxies = [said("p", "score", f"{g}-m{m}", m, rater_kind="proxy") for g in ("g", "h") for m in range(2)]
    ann = [said("ann", "choice", "g-m0", 1, "g-m1")]
    table = derive({"g": 2, "h": 2}, proxies + ann, proxies_decide=False).table
    assert table["pair_id"].to_pylist() == ["g-0>1"]


def test_decisions_over_peoples_votes_come_with_their_weight() -> None:
    seen: list[pa.Table] = []

    def decide(votes: pa.Table) -> pa.Table:
        seen.append(votes)
        row = {"group_id": "g", "first_id": "g-m0", "second_id": "g-m1", "first_member": 0, "second_member": 1,
               "num_raters": 2, "outcome": -1, "weight": 0.25, "agreement": 0.5}  # fmt: skip
        return pa.Table.from_pylist([row])

    votes = [
        said("ann", "choice", "g-m0", 1, "g-m1"), said("bob", "choice", "g-m1", 1, "g-m0"),
        said("p", "score", "g-m0", 1, rater_kind="proxy"), said("p", "score", "g-m1", 0, rater_kind="proxy"),
    ]  # fmt: skip
    rows = derive({"g": 2}, votes, decide_people=decide).table.to_pylist()
    assert [(v["rater"], v["vote"]) for v in seen[0].to_pylist()] == [("ann", 1), ("bob", -1)]
    assert [(row["pair_id"], row["weight"], row["num_raters"]) for row in rows] == [("g-1>0", 0.25, 2)]


def proxy_scores(groups: dict[str, np.ndarray], names: Sequence[str]) -> list[dict[str, Any]]:
    """Judgements of proxy scorers, whose scores are the columns ``[members, K scorers]`` of each group."""
    return [
        row | {"rater": names[k], "rater_kind": "proxy", "source": "proxy"}
        for group, scores in groups.items()
        for k in range(scores.shape[1])
        for row in scores_of(group, names[k], scores[:, k])
    ]


def weighted_in_numpy(
    groups: dict[str, np.ndarray], weight_K: np.ndarray
) -> tuple[dict[tuple[str, str], tuple[int, float]], int]:
    """(winner, loser) -> (scorers, share of them for the winner), and ties: from sums of z-scores over the round."""
    stacked_NK = np.concatenate(list(groups.values()))
    spread_K = stacked_NK.std(axis=0)
    won, ties = {}, 0
    for group, scores in groups.items():
        z_NK = np.divide(scores - stacked_NK.mean(axis=0), spread_K, out=np.zeros(scores.shape), where=spread_K > 0)
        sum_N = z_NK @ weight_K
        for a, b in itertools.combinations(range(len(scores)), 2):
            if np.isclose(sum_N[a], sum_N[b], rtol=0, atol=1e-9):
                ties += 1
                continue
            winner, loser = (a, b) if sum_N[a] > sum_N[b] else (b, a)
            share = float((scores[winner] > scores[loser]).mean())
            won[f"{group}-m{winner}", f"{group}-m{loser}"] = (scores.shape[1], share)
    return won, ties


@settings(max_examples=30)
@given(scored_groups(), st.data())
def test_weighted_equals_sums_of_standardised_scores_in_numpy(
    groups: dict[str, np.ndarray], data: st.DataObject
) -> None:
    count = next(iter(groups.values())).shape[1]
    names = [f"scorer{k}" for k in range(count)]
    # Units and zero points are anything; weights are few, so that sums are often equal.
    units = data.draw(st.lists(st.sampled_from((1e-3, 1.0, 0.1, 1e6)), min_size=count, max_size=count))
    weights = data.draw(st.lists(st.sampled_from((0.5, 1.0, 3.0)), min_size=count, max_size=count))
    groups = {group: (scores + 7) * np.array(units) for group, scores in groups.items()}
    expected, ties = weighted_in_numpy(groups, np.array(weights))
    given_weights = {name: weight for name, weight in zip(names, weights, strict=True) if weight != 1}
    sizes = {group: len(scores) for group, scores in groups.items()}
    derived = derive(sizes, proxy_scores(groups, names), "weighted", weights=given_weights)
    found = {
        (row["winner_id"], row["loser_id"]): (row["num_raters"], pytest.approx(row["agreement"]))
        for row in derived.table.to_pylist()
    }
    assert found == expected
    assert derived.num_ties == ties


def test_weight_turns_a_pair_that_pareto_leaves_undecided() -> None:
    groups = {"g": np.array([[9.0, 0.1], [1.0, 0.2]])}
    rows = proxy_scores(groups, ("sharp", "bright"))
    assert outcome(derive({"g": 2}, rows)) == []
    assert outcome(derive({"g": 2}, rows, "weighted")) == []  # as far apart in both, in standard deviations
    assert outcome(derive({"g": 2}, rows, "weighted", weights={"sharp": 2})) == [("m0", "m1")]
    assert outcome(derive({"g": 2}, rows, "weighted", weights={"bright": 1.01})) == [("m1", "m0")]


def test_scorer_that_scores_all_alike_adds_nothing_to_the_sum() -> None:
    scores = np.array([[0.1, 2.0], [0.1, 1.0], [0.1, 2.0]])
    derived = derive({"g": 3}, proxy_scores({"g": scores}, ("flat", "taste")), "weighted", weights={"flat": 1e9})
    assert set(outcome(derived)) == {("m0", "m1"), ("m2", "m1")}
    assert derived.num_ties == 1


def test_weighted_standing_gives_the_best_and_the_worst() -> None:
    scores = np.array([[2.0, 2.0], [4.0, 3.0], [1.0, 1.0], [3.0, 4.0]])
    derived = derive({"g": 4}, proxy_scores({"g": scores}, ("a", "b")), "weighted", "best_worst", weights={"b": 2})
    assert outcome(derived) == [("m3", "m2")]


def test_scores_are_standardised_over_the_round_and_the_round_alone() -> None:
    # Scorer `a` is apart by 1 in group g, which is little beside group h; without h it would be as much as b's 1.
    groups = {"g": np.array([[1.0, 0.0], [0.0, 1.0]]), "h": np.array([[50.0, 0.0], [-50.0, 0.0]])}
    elsewhere = proxy_scores({"g": np.array([[0.0, 900.0], [0.0, -900.0]])}, ("a", "b"))
    derived = derive({"g": 2, "h": 2}, proxy_scores(groups, ("a", "b")), "weighted", elsewhere=elsewhere)
    assert sorted(derived.table["pair_id"].to_pylist()) == ["g-1>0", "h-0>1"]


@pytest.mark.parametrize("proxies_decide", [True, False])
def test_people_alone_decide_what_they_judged_also_beside_weights(proxies_decide: bool) -> None:
    scores = np.array([[0.0], [1.0]])
    rows = [*proxy_scores({"g": scores, "h": scores}, ("taste",)), said("ann", "choice", "g-m0", 1, "g-m1")]
    derived = derive({"g": 2, "h": 2}, rows, "weighted", weights={"taste": 1e6}, proxies_decide=proxies_decide)
    expected = ["g-0>1", "h-1>0"] if proxies_decide else ["g-0>1"]
    assert sorted(derived.table["pair_id"].to_pylist()) == expected


def test_later_score_of_the_same_scorer_replaces_the_earlier_in_the_sum() -> None:
    rows = proxy_scores({"g": np.array([[5.0], [3.0]])}, ("taste",))
    later = said("taste", "score", "g-m0", 1, minute=1, rater_kind="proxy")
    assert outcome(derive({"g": 2}, [*rows, later], "weighted")) == [("m1", "m0")]


def test_weighted_result_does_not_depend_on_the_order_of_the_rows() -> None:
    rng = np.random.default_rng(0)
    groups = {f"g{n}": rng.normal(size=(6, 3)).round(1) for n in range(20)}
    rows = proxy_scores(groups, ("a", "b", "c"))
    shuffled = [rows[i] for i in rng.permutation(len(rows))]
    sizes = dict.fromkeys(groups, 6)
    weights = {"a": 0.3, "b": 0.7}
    assert derive(sizes, rows, "weighted", weights=weights).table.equals(
        derive(sizes, shuffled, "weighted", weights=weights).table
    )
