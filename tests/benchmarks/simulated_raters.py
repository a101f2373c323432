"""Raters whose accuracy is known: the truth of every group, and the votes that they would give."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

MODES = ("mark_bad", "pair")
Truth = dict[tuple[str, str], int]


def draw_groups(groups: int, size: int, share_good: float, seed: int) -> np.ndarray:
    """Which images are good: ``[G groups, M members]`` of 0 and 1."""
    return (np.random.default_rng(seed).random((groups, size)) < share_good).astype(int)


def true_answers(good_GM: np.ndarray) -> Truth:
    """The answer to every pair of every group: 1 if the first is better, -1 if the second is, 0 if neither."""
    return {
        (f"g{g}-m{a}", f"g{g}-m{b}"): int(np.sign(good_M[a] - good_M[b]))
        for g, good_M in enumerate(good_GM)
        for a, b in itertools.combinations(range(len(good_M)), 2)
    }


def simulate_votes(
    good_GM: np.ndarray,
    accuracies: Sequence[float],
    seed: int,
    mode: str = "mark_bad",
    raters_per_group: int | None = None,
    gold_groups: int = 0,
) -> pa.Table:
    """Votes of raters who are right with a known probability, as ``collect_votes`` gives them.

    ``mark_bad``: a rater marks each image, right with the given accuracy; a pair of equal marks is a tie.
    ``pair``: a rater answers each pair; of an order, the opposite when wrong; of a tie, either side when wrong.

    Args:
        good_GM: from draw_groups.
        accuracies: one a rater; below 1/2 is malicious.
        seed: fixes all answers; they do not depend on the other raters.
        mode: ``mark_bad`` or ``pair``.
        raters_per_group: so many raters, drawn at random, judge a group; all when not given.
        gold_groups: the first so many groups have known answers.
    """
    rows = []
    shifts = np.random.default_rng([seed, 0]).random((len(good_GM), len(accuracies))).argsort(axis=1)
    for k, accuracy in enumerate(accuracies):
        random = np.random.default_rng([seed, 1, k])
        for g, good_M in enumerate(good_GM):
            answers = _answers(good_M, accuracy, mode, random)
            if raters_per_group is None or k in shifts[g, :raters_per_group]:
                rows += _rows(g, answers, f"rater{k}", "human")
    for g, good_M in enumerate(good_GM[:gold_groups]):
        rows += _rows(g, _answers(good_M, 1.0, mode, np.random.default_rng(0)), "known", "gold")
    return votes_table(rows)


def _answers(good_M: np.ndarray, accuracy: float, mode: str, random: np.random.Generator) -> dict[tuple[int, int], int]:
    pairs = list(itertools.combinations(range(len(good_M)), 2))
    if mode == "mark_bad":
        mark_M = np.where(random.random(len(good_M)) < accuracy, good_M, 1 - good_M)
        return {(a, b): int(np.sign(mark_M[a] - mark_M[b])) for a, b in pairs}
    answers = {}
    for a, b in pairs:
        truth, right, side = int(np.sign(good_M[a] - good_M[b])), random.random() < accuracy, random.choice([-1, 1])
        answers[a, b] = truth if right else -truth or int(side)
    return answers


def _rows(g: int, answers: dict[tuple[int, int], int], rater: str, kind: str) -> list[dict[str, Any]]:
    return [vote(f"g{g}", a, b, answer, rater, kind) for (a, b), answer in answers.items()]


def vote(group: str, first: int, second: int, answer: int, rater: str, kind: str = "human") -> dict[str, Any]:
    """One row of a votes table."""
    return {
        "group_id": group, "first_id": f"{group}-m{first}", "second_id": f"{group}-m{second}", "first_member": first,
        "second_member": second, "rater": rater, "rater_kind": kind, "vote": answer,
    }  # fmt: skip


def votes_table(rows: list[dict[str, Any]]) -> pa.Table:
    """Rows of votes as an Arrow table with the types that DuckDB gives."""
    text = ("group_id", "first_id", "second_id", "rater", "rater_kind")
    names = ("group_id", "first_id", "second_id", "first_member", "second_member", "rater", "rater_kind", "vote")
    whole = {"first_member": pa.int64(), "second_member": pa.int64(), "vote": pa.int8()}
    return pa.Table.from_pylist(rows, schema=pa.schema([(n, pa.string() if n in text else whole[n]) for n in names]))


def quality(decided: pa.Table, truth: Truth) -> dict[str, float]:
    """How right decisions are.

    Returns:
        right: share of the pairs with a true order that were decided that way, a tie counting half;
        signal: (weight on right orders - weight on wrong ones) / weight on all, over the pairs to train on.
    """
    right, signal, total = [], 0.0, 0.0
    for row in decided.to_pylist():
        true = truth[row["first_id"], row["second_id"]]
        if true:
            right.append((1 + true * row["outcome"]) / 2)
        if row["outcome"]:
            signal += row["weight"] * true * row["outcome"]
            total += row["weight"]
    return {"right": float(np.mean(right)), "signal": signal / total if total else 0.0}
