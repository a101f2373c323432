"""Turn a round's judgements and preferences into labels of single images: a number, and good or bad.

    scores         the sum of the scorers' scores, each standardised over the round, times ``judge.scorer_weights``
    win_rate       the mean over the group's other images of the chance to beat them: (1 + weight) / 2 for a won pair,
                   (1 - weight) / 2 for a lost one, 1/2 for a tie or a pair that nobody judged
    bradley_terry  the logarithm of the strength that best explains those chances, each shrunk half-way to 1/2; the fit
                   is crowd-kit's (``deciding`` has its quirks)

An image is good or bad by people's marks (``mark_bad``), more than half of them for gold and raters who still have a
vote; without marks, by whether its number is above its group's mean.
"""

from collections.abc import Collection, Mapping

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa

MM_ITERATIONS = 1000
CHANCES = 100  # a chance becomes this many wins and losses
SAME = 1e-9  # numbers closer than this are equal up to rounding

_SCORES = """
SELECT s.group_id, j.sample_id, j.rater, j.value FROM judgements j
JOIN samples s ON s.sample_id = j.sample_id AND s.round = j.round
WHERE j.round = $round AND j.rater_kind = 'proxy' AND j.kind = 'score' AND j.value IS NOT NULL
QUALIFY row_number() OVER (PARTITION BY j.sample_id, j.rater ORDER BY j.judged_at DESC, j.value DESC) = 1
"""

# Each rater's last mark on each image; gold decides the images that it marks.
_MARKS = """
SELECT sample_id, CASE WHEN bool_or(rater_kind = 'gold') THEN avg(value) FILTER (rater_kind = 'gold')
                       ELSE avg(value) END AS mark
FROM (
    SELECT sample_id, rater, rater_kind, if(value > 0, 1, 0) AS value FROM judgements
    WHERE round = $round AND kind = 'rating' AND rater_kind != 'proxy' AND NOT list_contains($left_out, rater)
    QUALIFY row_number() OVER (
        PARTITION BY sample_id, rater ORDER BY judged_at DESC, source DESC, value DESC) = 1 AND value IS NOT NULL
) GROUP BY sample_id
"""

_PEOPLE = """
SELECT DISTINCT s.group_id FROM judgements j
JOIN samples s ON s.sample_id = j.sample_id AND s.round = j.round
WHERE j.round = $round AND j.rater_kind != 'proxy' AND j.value IS NOT NULL
"""


def image_labels(
    connection: duckdb.DuckDBPyConnection,
    round_number: int,
    preferences: pa.Table,
    rewards: str,
    proxies_decide: bool = True,
    weights: Mapping[str, float] | None = None,
    left_out: Collection[str] = (),
) -> list[dict[str, object]]:
    """Return the rows of ``image_labels``: one per image of a group that somebody decided.

    Args:
        connection: a database with ``samples`` and ``judgements``.
        round_number: the round.
        preferences: the round's pairs.
        rewards: ``auto``, ``scores``, ``win_rate`` or ``bradley_terry``; auto takes win rates where people judged.
        proxies_decide: whether scorers decide the groups that no person judged; else those have no labels.
        weights: weight per scorer; 1 by default.
        left_out: raters who have no vote.
    """
    of_round = {"round": round_number}
    samples = connection.execute(
        "SELECT sample_id, group_id FROM samples WHERE round = $round AND split = 'train' ORDER BY group_id, member",
        of_round,
    ).df()
    people = set(connection.execute(_PEOPLE, of_round).df().group_id)
    marks = connection.execute(_MARKS, of_round | {"left_out": list(left_out)}).df().set_index("sample_id").mark
    scores = _standard_scores(connection.execute(_SCORES, of_round).df(), weights or {})
    pairs = preferences.to_pandas()
    pairs_of = dict(list(pairs.groupby("group_id")))
    rows: list[dict[str, object]] = []
    for group_id, images in samples.groupby("group_id", sort=False).sample_id:
        if group_id not in people and not proxies_decide:
            continue
        kind = ("win_rate" if group_id in people else "scores") if rewards == "auto" else rewards
        if kind == "scores":
            reward = scores.reindex(images).to_numpy()
        else:
            chance_MM = _chances(list(images), pairs_of.get(group_id, pairs[:0]))
            reward = _win_rates(chance_MM) if kind == "win_rate" else _strengths(chance_MM)
        rows += _labelled(str(group_id), list(images), reward, marks.reindex(images).to_numpy(dtype=float))
    return rows


def _labelled(group: str, images: list[str], reward_M: np.ndarray, mark_M: np.ndarray) -> list[dict[str, object]]:
    lead_M = reward_M - np.nanmean(reward_M) if np.isfinite(reward_M).any() else reward_M
    side_M = np.where(np.isnan(mark_M), lead_M, mark_M - 0.5)
    return [
        {
            "sample_id": image, "group_id": group, "reward": float(reward) if np.isfinite(reward) else None,
            "good": bool(side > 0) if abs(side) > SAME else None,
        }
        for image, reward, side in zip(images, reward_M, side_M, strict=True)
    ]  # fmt: skip


def _standard_scores(scores: pd.DataFrame, weights: Mapping[str, float]) -> pd.Series:
    """Return each image's sum of standardised scores; a scorer that gives all images the same adds nothing."""
    total = pd.Series(dtype=float)
    for rater, given in sorted(scores.groupby("rater"), key=lambda item: str(item[0])):
        value = given.set_index("sample_id").value.sort_index()
        spread = float(value.std(ddof=0))
        part = (value - value.mean()) / spread if spread > 0 else 0.0 * value
        total = total.add(weights.get(str(rater), 1.0) * part, fill_value=0.0)
    return total


def _chances(images: list[str], pairs: pd.DataFrame) -> np.ndarray:
    """Return the chance of each image to beat each other ``[M, M]``; 1/2 where nobody won."""
    place = {image: row for row, image in enumerate(images)}
    chance_MM = np.full((len(images), len(images)), 0.5)
    for winner, loser, weight in zip(pairs.winner_id, pairs.loser_id, pairs.weight, strict=True):
        chance_MM[place[winner], place[loser]] = (1 + weight) / 2
        chance_MM[place[loser], place[winner]] = (1 - weight) / 2
    return chance_MM


def _win_rates(chance_MM: np.ndarray) -> np.ndarray:
    others = len(chance_MM) - 1
    return (chance_MM.sum(1) - 0.5) / others if others else np.full(1, 0.5)


def _strengths(chance_MM: np.ndarray) -> np.ndarray:
    from crowdkit.aggregation import BradleyTerry

    left, right = np.triu_indices(len(chance_MM), k=1)
    wins = np.round(CHANCES * (chance_MM[left, right] + 0.5) / 2).astype(int)
    counts = np.stack([wins, CHANCES - wins], axis=1).ravel()
    winner = np.repeat(np.stack([left, right], axis=1).ravel(), counts)
    table = pd.DataFrame({"left": left.repeat(CHANCES), "right": right.repeat(CHANCES), "label": winner})
    strength = BradleyTerry(n_iter=MM_ITERATIONS, tol=0.0).fit_predict(table)
    return np.log(strength.reindex(range(len(chance_MM))).to_numpy())
