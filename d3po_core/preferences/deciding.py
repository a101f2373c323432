"""Combine several raters' votes into one decision per pair of images, with a weight.

    majority       the side with more votes; weight (for - against) / raters, so that a unanimous pair weighs 1
    dawid_skene    one confusion matrix per rater, estimated with the decisions; weight |p(first) - p(second)|
    bradley_terry  one strength per image, all raters count alike; weight |2p - 1|, p: the first beats the second

Gold questions decide the pairs that they answer, and raters who fail them are left out. A decision without weight is a
tie. Dawid-Skene and Bradley-Terry come from crowd-kit. Quirks of its version 1.4.2, and what we do about each:

- Dawid-Skene distinguishes first from second, which is only the members' order. We pass every pair mirrored as well, so
  the order cannot matter and the same votes estimate half as many numbers.
- Its EM stops when the likelihood bound stops growing, but the bound counts a task's prior once per vote and may fall
  while EM improves: with 3 of 5 raters per group it stopped after 3 iterations. ``tol`` -inf keeps it going.
- It has no prior, so a few pairs can flip everybody's votes. We give every rater some answers of known truth, mostly
  right (PRIOR_RIGHT, PRIOR_WRONG). ``initial_error`` cannot replace them: it acts before the first iteration only.
- Bradley-Terry's convergence test compares an array with itself and stops after two iterations unless ``tol`` is 0.
- Bradley-Terry takes no ties, and an image that never wins or never loses has no finite strength. We count a tie as
  half a win for both, and add half a win to both sides of each compared pair. Parts of a group that were never compared
  are fitted separately. Sparse comparisons (long chains) converge slowly: 7 images in a row to 1e-3 of the weight, 20
  in a row to 0.03.
- Both get sorted rows of numbers, so that the order of the votes changes nothing.

Sources: Dawid and Skene, Applied Statistics 28 (1979); Hunter, Annals of Statistics 32 (2004).
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa

from d3po_core.errors import D3POError
from d3po_core.preferences.gold import PAIR, GoldScore, gold_scores, left_out, sum_scores, votes_frame

PRIOR_RIGHT, PRIOR_WRONG = 2, 1
SMALLEST_WEIGHT = 1e-6
EM_ITERATIONS, MM_ITERATIONS = 30, 1000
GROUPS_A_FIT = 16

DECISIONS = pa.schema(
    [("group_id", pa.string()), ("first_id", pa.string()), ("second_id", pa.string()), ("first_member", pa.int64()),
     ("second_member", pa.int64()), ("num_raters", pa.int64()), ("outcome", pa.int64()), ("weight", pa.float64()),
     ("agreement", pa.float64())]
)  # fmt: skip


def decide(
    votes: pa.Table, combine: str, accuracy_floor: float, earlier_gold: Mapping[str, GoldScore] | None = None
) -> pa.Table:
    """Return one decision per pair that a person or gold voted on.

    Args:
        votes: people's votes of one round from ``deriving.collect_votes``; rows in any order.
        combine: ``majority``, ``dawid_skene`` or ``bradley_terry``.
        accuracy_floor: raters whose gold answers fall below it (gold.left_out) have no vote.
        earlier_gold: gold scores of earlier rounds, added to those among the votes.

    Returns:
        One row per pair, sorted by group and members: num_raters with a vote (gold counts as one), outcome (1: the
        first won, -1: the second, 0: a tie), weight in (0, 1] (1 for ties and for gold's decisions), agreement in
        (0, 1]: the share of the larger side. Pairs that only left-out raters voted on are missing.

    Raises:
        D3POError: ``combine`` is unknown.
    """
    if combine not in _MARGINS:
        raise D3POError(f"judge.people.combine is {combine!r}; expected one of {', '.join(_MARGINS)}")
    gold = sum_scores(earlier_gold or {}, gold_scores(votes))
    frame = votes_frame(votes)
    kept = frame[(frame.rater_kind == "gold") | ~frame.rater.isin(left_out(gold, accuracy_floor))]
    if kept.empty:
        return DECISIONS.empty_table()
    pairs, ballots = _ballots(kept)
    tally = pd.crosstab(kept.groupby(PAIR).ngroup(), kept.vote).reindex(columns=[-1, 0, 1], fill_value=0).to_numpy()
    against_P, tied_P, for_P = tally.T
    # If nobody preferred either image, no model may decide the pair.
    margin_P = np.where(np.maximum(for_P, against_P) > 0, _MARGINS[combine](ballots), 0.0)
    margin_P = np.where(np.isnan(ballots.known_P), margin_P, ballots.known_P)
    outcome_P = np.where(np.abs(margin_P) > SMALLEST_WEIGHT, np.sign(margin_P), 0).astype(int)
    agreed_P = np.maximum(for_P, against_P)
    agreed_P = np.where(outcome_P == 0, np.maximum(agreed_P, tied_P), agreed_P)
    decided = pairs.assign(
        num_raters=tally.sum(1), outcome=outcome_P, agreement=agreed_P / tally.sum(1),
        weight=np.where(outcome_P == 0, 1.0, np.minimum(np.abs(margin_P), 1.0)),
    )  # fmt: skip
    return pa.Table.from_pandas(decided[DECISIONS.names], schema=DECISIONS, preserve_index=False)


def reliability(votes: pa.Table) -> dict[str, float]:
    """Return each person's share of right votes, 0 to 1, on pairs where Dawid-Skene finds one image better.

    A tie counts half, so that guessing gives 1/2. Only pairs with votes of several people, or of a person and gold,
    count; a rater without such pairs is missing. The estimated truth includes the rater's own vote.
    """
    frame = votes_frame(votes)
    if frame.empty:
        return {}
    _, ballots = _ballots(frame)
    several_P = (np.bincount(ballots.pair_V, minlength=ballots.num_pairs) > 1) | ~np.isnan(ballots.known_P)
    against_P, _, for_P = _posterior(ballots).T
    right_V = (for_P * several_P)[ballots.pair_V] * (1 + ballots.vote_V) / 2
    right_V += (against_P * several_P)[ballots.pair_V] * (1 - ballots.vote_V) / 2
    ordered_V = ((for_P + against_P) * several_P)[ballots.pair_V]
    right_R, ordered_R = (np.bincount(ballots.rater_V, value_V) for value_V in (right_V, ordered_V))
    return {
        name: float(right / ordered)
        for name, right, ordered in zip(ballots.raters, right_R, ordered_R, strict=True)
        if ordered > SMALLEST_WEIGHT
    }


@dataclass(frozen=True)
class _Ballots:
    """People's votes as numbers, sorted by pair and rater: V votes on P pairs of G groups."""

    pair_V: np.ndarray
    rater_V: np.ndarray
    vote_V: np.ndarray
    known_P: np.ndarray  # gold's answer, nan without one
    group_P: np.ndarray
    image_P2: np.ndarray
    raters: list[str]

    @property
    def num_pairs(self) -> int:
        return len(self.known_P)


def _ballots(frame: pd.DataFrame) -> tuple[pd.DataFrame, _Ballots]:
    """Return the distinct pairs in order, and the votes on them."""
    frame = frame.assign(pair=frame.groupby(PAIR).ngroup()).sort_values(["pair", "rater"])
    pairs = frame.drop_duplicates("pair")[PAIR].reset_index(drop=True)
    is_gold = frame.rater_kind == "gold"
    people = frame[~is_gold]
    known = np.sign(frame[is_gold].groupby("pair").vote.sum()).reindex(range(len(pairs)))
    rater_V, raters = pd.factorize(people.rater, sort=True)
    images, _ = pd.factorize(pd.concat([pairs.first_id, pairs.second_id]))
    return pairs, _Ballots(
        people.pair.to_numpy(), rater_V, people.vote.to_numpy(), known.to_numpy(dtype=float),
        pairs.groupby("group_id").ngroup().to_numpy(), images.reshape(2, -1).T, list(raters),
    )  # fmt: skip


def _majority(ballots: _Ballots) -> np.ndarray:
    votes_P = np.bincount(ballots.pair_V, minlength=ballots.num_pairs)
    balance_P = np.bincount(ballots.pair_V, ballots.vote_V, ballots.num_pairs)
    return balance_P / np.maximum(votes_P, 1)


def _dawid_skene(ballots: _Ballots) -> np.ndarray:
    posterior_P3 = _posterior(ballots)
    return posterior_P3[:, 2] - posterior_P3[:, 0]


def _posterior(ballots: _Ballots) -> np.ndarray:
    """Return the probabilities ``[P, 3]`` that the second is better, that neither is, that the first is."""
    from crowdkit.aggregation import DawidSkene

    posterior_P3 = np.full((ballots.num_pairs, 3), 1 / 3)
    if len(ballots.vote_V):
        task_V, count = ballots.pair_V, ballots.num_pairs
        labels = sorted({*ballots.vote_V, *-ballots.vote_V})
        parts = [(task_V, ballots.rater_V, ballots.vote_V), (task_V + count, ballots.rater_V, -ballots.vote_V)]
        known_P = pd.Series(np.concatenate([ballots.known_P, -ballots.known_P])).dropna()
        prior, prior_truth = _prior(len(ballots.raters), labels, first_task=2 * count)
        tasks = pd.DataFrame({
            name: np.concatenate([part[i] for part in [*parts, prior]])
            for i, name in enumerate(("task", "worker", "label"))
        })  # fmt: skip
        # Drop gold labels that nobody used: crowd-kit's tables have no row for them, and gold decides the pair anyway.
        truth = pd.concat([known_P[known_P.isin(labels)].astype(int), prior_truth])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # crowd-kit was written before pandas 3
            found = DawidSkene(n_iter=EM_ITERATIONS, tol=-np.inf).fit_predict_proba(tasks, true_labels=truth)
        found = found.reindex(index=range(count), columns=[-1, 0, 1]).fillna(0.0)
        judged_P = np.bincount(task_V, minlength=count) > 0
        posterior_P3[judged_P] = found.to_numpy()[judged_P]
    truth_P = ballots.known_P
    posterior_P3[~np.isnan(truth_P)] = np.eye(3)[truth_P[~np.isnan(truth_P)].astype(int) + 1]
    return posterior_P3


def _prior(num_raters: int, labels: list[int], first_task: int) -> tuple[tuple[np.ndarray, ...], pd.Series]:
    """Return each rater's assumed answers to tasks of known truth, as (task, worker, label), and the truth."""
    kinds = [(truth, said, PRIOR_RIGHT if truth == said else PRIOR_WRONG) for truth in labels for said in labels]
    truth_K, said_K = (np.repeat([kind[i] for kind in kinds], [kind[2] for kind in kinds]) for i in (0, 1))
    task = first_task + np.arange(num_raters * len(truth_K))
    worker = np.repeat(np.arange(num_raters), len(truth_K))
    return (task, worker, np.tile(said_K, num_raters)), pd.Series(np.tile(truth_K, num_raters), index=task)


def _bradley_terry(ballots: _Ballots) -> np.ndarray:
    from crowdkit.aggregation import BradleyTerry

    margin_P = np.zeros(ballots.num_pairs)
    votes_P = np.bincount(ballots.pair_V, minlength=ballots.num_pairs)
    balance_P = np.bincount(ballots.pair_V, ballots.vote_V, ballots.num_pairs).astype(int)
    # In half wins, to stay whole: two per vote, one per side of a tie, and one per side of a compared pair.
    wins_P2 = np.stack([votes_P + balance_P, votes_P - balance_P], axis=1) + 1
    judged_P = votes_P > 0
    # Groups are independent, so fit a few at a time to keep crowd-kit's win matrix small.
    for fit in np.unique(ballots.group_P[judged_P] // GROUPS_A_FIT):
        chosen = np.flatnonzero(judged_P & (ballots.group_P // GROUPS_A_FIT == fit))
        repeats = wins_P2[chosen].sum(1)
        left, right = (np.repeat(ballots.image_P2[chosen, side], repeats) for side in (0, 1))
        winner = np.repeat(ballots.image_P2[chosen].ravel(), wins_P2[chosen].ravel())
        wins = pd.DataFrame({"left": left, "right": right, "label": winner})
        strength = BradleyTerry(n_iter=MM_ITERATIONS, tol=0.0).fit_predict(wins)
        first, second = (strength.loc[ballots.image_P2[chosen, side]].to_numpy() for side in (0, 1))
        margin_P[chosen] = (first - second) / (first + second)
    return margin_P


_MARGINS: dict[str, Callable[[_Ballots], np.ndarray]] = {
    "majority": _majority,
    "dawid_skene": _dawid_skene,
    "bradley_terry": _bradley_terry,
}
