"""Is one checkpoint better than another? Paired on the same held-out prompts and seeds, with intervals over prompts.

Images of one prompt are not independent: what is resampled is the prompt, with all its images. Every prompt weighs the
same. With a single prompt its images are resampled, and the interval speaks of that prompt alone.

Names in shapes: R checkpoints, I images (a prompt and a seed each), U units that are resampled, K images of one prompt.
"""

from dataclasses import dataclass
from pathlib import Path

import duckdb
import numpy as np
from scipy.spatial.distance import pdist
from scipy.stats import bootstrap, norm, t

from d3po_core.campaign import finished_numbers
from d3po_core.errors import D3POError
from d3po_core.images import load_pngs
from d3po_core.records import ScoreSummary
from d3po_core.tables import connect

CONFIDENCE = 0.95
RESAMPLES = 2000
# Of fewer units even a unanimous sign test (2 * 0.5^5 = 0.06) would not reach 5 %.
MIN_UNITS = 6

BETTER, WORSE, UNCLEAR = "better", "worse", "no clear difference"


@dataclass(frozen=True)
class Comparison:
    """A checkpoint against a reference, on the same images.

    ``difference`` is the mean of score minus reference score; ``win_rate`` the share of images on which the checkpoint
    scores higher, where a tie counts one half; both with 95 % intervals over ``num_units`` units.
    """

    num_units: int
    num_images: int
    difference: ScoreSummary
    win_rate: ScoreSummary

    @property
    def verdict(self) -> str:
        """``better`` or ``worse`` if the interval of the difference leaves out 0 and there are units enough."""
        if self.num_units >= MIN_UNITS and self.difference.low > 0:
            return BETTER
        if self.num_units >= MIN_UNITS and self.difference.high < 0:
            return WORSE
        return UNCLEAR


@dataclass(frozen=True)
class HeldOut:
    """Held-out scores of R checkpoints on the I images, a prompt and a seed each, that all of them drew."""

    prompts: list[str]  # I
    seeds: list[int]  # I
    scores: dict[str, np.ndarray]  # scorer -> [R, I]; the first is the one that the rounds report
    image_paths: list[list[Path]]  # [R][I]


def unit_means(scores: np.ndarray, prompts: list[str]) -> np.ndarray:
    """Means ``[..., U]`` of scores ``[..., I]`` over each prompt's images; of one prompt the scores themselves.

    Equal rows have equal means, to the last bit: a matrix product may round its last rows otherwise, and a checkpoint
    that draws the same images would be the better one.
    """
    distinct, prompt_I = np.unique(np.asarray(prompts, dtype=object), return_inverse=True)
    if len(distinct) == 1:
        return scores
    counts_U = np.bincount(prompt_I)
    first_U = np.cumsum(counts_U) - counts_U
    return np.add.reduceat(scores[..., np.argsort(prompt_I, kind="stable")], first_U, axis=-1) / counts_U


def mean_intervals(units: np.ndarray) -> list[ScoreSummary]:
    """Mean of each row of ``[R, U]`` with its 95 % interval; the whole line when there is only one unit.

    A percentile bootstrap (scipy, fixed seed), its percentiles moved outwards so that it covers the mean of few units
    as often as of many: of 18 normal units 95 % of the time and not 93 %.

    Source: Hesterberg, "What Teachers Should Know About the Bootstrap", arXiv 1411.5279, Section 5.3, "expanded
    percentile interval".
    """
    means_R, count = units.mean(axis=-1), units.shape[-1]
    if count < 2:
        return [ScoreSummary(mean=mean, low=-np.inf, high=np.inf) for mean in means_R.tolist()]
    tail = norm.cdf(-np.sqrt(count / (count - 1)) * t.ppf((1 + CONFIDENCE) / 2, count - 1))
    found = bootstrap(
        (units,), np.mean, axis=-1, vectorized=True, batch=_batch(units), n_resamples=RESAMPLES,
        confidence_level=1 - 2 * tail, method="percentile", rng=0,
    ).confidence_interval  # fmt: skip
    # A resampled mean of equal units differs from their mean by rounding alone.
    low_R, high_R = np.minimum(found.low, means_R), np.maximum(found.high, means_R)
    constant_R = np.ptp(units, axis=-1) == 0
    low_R, high_R = (np.where(constant_R, means_R, bound_R) for bound_R in (low_R, high_R))
    rows = zip(means_R.tolist(), low_R.tolist(), high_R.tolist(), strict=True)
    return [ScoreSummary(mean=mean, low=low, high=high) for mean, low, high in rows]


def _batch(units: np.ndarray) -> int:
    return max(1, min(RESAMPLES, int(1e7 / units.size)))  # 80 MB at a time


def compare_rows(scores: np.ndarray, references: np.ndarray, prompts: list[str]) -> list[Comparison]:
    """Compare each row of ``scores`` ``[R, I]`` with the same row of ``references`` ``[R, I]``, image by image."""
    difference_RI = scores - references
    differences = mean_intervals(unit_means(difference_RI, prompts))
    wins = mean_intervals(unit_means((np.sign(difference_RI) + 1) / 2, prompts))
    num_units = len(set(prompts)) if len(set(prompts)) > 1 else len(prompts)
    return [
        Comparison(num_units, len(prompts), difference, _within(win, 0.0, 1.0))
        for difference, win in zip(differences, wins, strict=True)
    ]


def _within(summary: ScoreSummary, low: float, high: float) -> ScoreSummary:
    return ScoreSummary(mean=summary.mean, low=max(summary.low, low), high=min(summary.high, high))


def compare_scores(scores: np.ndarray, reference: np.ndarray, prompts: list[str]) -> Comparison:
    """Compare the scores ``[I]`` of a checkpoint with those of another, image by image (same prompt, same seed)."""
    return compare_rows(scores[None], reference[None], prompts)[0]


def champions(scores: np.ndarray, prompts: list[str]) -> list[int]:
    """The best checkpoint so far, after each of R checkpoints in order; the first, the base, starts as champion.

    A checkpoint takes over when its mean is higher than the champion's, unless it clearly wins less often: the
    interval of its paired win rate lies below 1/2 (a few images may lift a mean that most images lower).

    Args:
        scores: ``[R, I]`` of the first scorer.
        prompts: ``[I]``.
    """
    means_R = unit_means(scores, prompts).mean(axis=-1)
    best, reigns = 0, []
    for challenger, mean in enumerate(means_R):
        if mean > means_R[best]:
            against = compare_scores(scores[challenger], scores[best], prompts)
            best = challenger if against.win_rate.high >= 0.5 else best
        reigns.append(best)
    return reigns


def diversity(images: np.ndarray) -> float:
    """How much K images of one prompt differ: mean over their pairs of the mean absolute pixel difference.

    Args:
        images: uint8 ``[K, height, width, 3]``.

    Returns:
        0 (all alike) to 1 (black and white); NaN when there are fewer than two. It sees colour and place, not meaning:
        compare it between checkpoints on the same prompts and seeds, not between prompts.
    """
    if len(images) < 2:
        return float("nan")
    flat = images.reshape(len(images), -1) / 255.0
    return float(pdist(flat, "cityblock").mean() / flat.shape[1])


def diversity_by_prompt(prompts: list[str], paths: list[Path]) -> dict[str, float]:
    """Diversity of each prompt's images ``[I]``; a prompt of which fewer than two images are on disk is left out."""
    groups: dict[str, list[Path]] = {}
    for prompt, path in zip(prompts, paths, strict=True):
        if path.is_file():
            groups.setdefault(prompt, []).append(path)
    return {prompt: diversity(load_pngs(group)) for prompt, group in groups.items() if len(group) > 1}


def read_held_out(checkpoints: list[tuple[Path, int]]) -> HeldOut:
    """Scores of checkpoints, each a campaign's folder and a round, on the prompts and seeds that all of them share.

    Scorers that only some checkpoints have are left out.

    Raises:
        D3POError: a round is not evaluated, or there is no prompt and seed, or no scorer, that all share.
    """
    with duckdb.connect(":memory:") as everything:
        everything.execute(
            "CREATE TABLE held_out (row INT, scorer TEXT, main BOOL, prompt TEXT, seed BIGINT, score DOUBLE, path TEXT)"
        )
        for folder in dict.fromkeys(folder for folder, _ in checkpoints):
            _copy_scores(folder, checkpoints, everything)
        evaluated = {row for (row,) in everything.execute("SELECT DISTINCT row FROM held_out").fetchall()}
        found = everything.execute(_SHARED, {"n": len(checkpoints)}).fetchnumpy()
    for row, (folder, number) in enumerate(checkpoints):
        if row not in evaluated:
            raise D3POError(f"round {number} of campaign {folder.name!r} has no evaluation; finished rounds: "
                            f"{', '.join(map(str, finished_numbers(folder))) or 'none'}")  # fmt: skip
    if not len(found["row"]):
        names = ", ".join(f"{folder.name}:{number}" for folder, number in checkpoints)
        raise D3POError(
            f"{names} share no held-out prompt and seed with a common scorer; only checkpoints that were evaluated on "
            "the same prompts, with the same campaign seed and scorer, can be compared"
        )
    scorers = list(dict.fromkeys(found["scorer"].tolist()))
    shape = (len(scorers), len(checkpoints), -1)
    score_SRI, path_RI = found["score"].reshape(shape), found["path"].reshape(shape)[0]
    images = path_RI.shape[1]
    return HeldOut(
        prompts=found["prompt"][:images].tolist(),
        seeds=found["seed"][:images].tolist(),
        scores=dict(zip(scorers, score_SRI, strict=True)),
        image_paths=[[folder / p for p in paths] for (folder, _), paths in zip(checkpoints, path_RI, strict=True)],
    )


_SHARED = """
WITH common AS (
    SELECT scorer, bool_or(main) AS main FROM held_out GROUP BY scorer HAVING count(DISTINCT row) = $n
), shared AS (
    SELECT prompt, seed FROM held_out JOIN common USING (scorer)
    GROUP BY ALL HAVING count(*) = $n * (SELECT count(*) FROM common)
)
SELECT scorer, row, prompt, seed, score, path
FROM held_out JOIN shared USING (prompt, seed) JOIN common USING (scorer)
ORDER BY common.main DESC, scorer, row, prompt, seed
"""


def _copy_scores(folder: Path, checkpoints: list[tuple[Path, int]], into: duckdb.DuckDBPyConnection) -> None:
    with connect(folder) as connection:
        connection.execute("CREATE TEMP TABLE wanted (row INT, round BIGINT)")
        wanted = [[row, number] for row, (other, number) in enumerate(checkpoints) if other == folder]
        connection.executemany("INSERT INTO wanted VALUES (?, ?)", wanted)
        scores = connection.sql(
            """SELECT row, scorer, scorer = (SELECT max_by(eval_scorer, round) FROM rounds) AS main, prompt, seed,
                      avg(score) AS score, min(image_path) AS path
            FROM evaluations JOIN wanted USING (round) GROUP BY ALL"""
        ).to_arrow_table()
    into.register("scores", scores)
    into.execute("INSERT INTO held_out SELECT * FROM scores")
    into.unregister("scores")


def round_named(folder: Path, name: str) -> int:
    """The round that a name means: ``base``, ``latest``, ``champion`` or a number.

    Raises:
        D3POError: no finished round is called so.
    """
    rounds = finished_numbers(folder)
    if name == "champion" and rounds:
        with connect(folder) as connection:
            recorded = connection.sql("SELECT arg_max(champion, round) FROM rounds").fetchall()[0][0]
        if recorded is not None:  # by the guard, which rejected what may look best
            return int(recorded)
        held_out = read_held_out([(folder, number) for number in rounds])
        return rounds[champions(next(iter(held_out.scores.values())), held_out.prompts)[-1]]
    named = {str(number): number for number in rounds} | ({"base": rounds[0], "latest": rounds[-1]} if rounds else {})
    if name not in named:
        raise D3POError(
            f"{name!r} is no finished round of campaign {folder.name!r}; expected base, latest, champion or one of "
            f"{', '.join(map(str, rounds)) or '(it has none yet)'}"
        )
    return named[name]
