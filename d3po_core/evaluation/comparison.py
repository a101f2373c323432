"""Compare checkpoints on the same held-out prompts and seeds, with intervals over prompts.

Images of one prompt are not independent, so the units are prompts, each with the mean of its images. Every prompt
weighs the same. With a single prompt, its images are the units, and the interval holds for that prompt alone.

The champion is the best of many noisy scores, so its score on the images that chose it is too high. ``fitted_champion``
judges each prompt by the champion that the other half of the prompts chose. A verdict needs a one-sided p-value below
``SURE``. A campaign of 100 rounds changes its champion some ten times; among campaigns that learned nothing, the report
ever calls the champion better in at most 5 % (tests/benchmarks/false_alarms.py).

Names in shapes: R checkpoints, I images (one prompt and one seed each), U units, K images of one prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import duckdb
import numpy as np
import pyarrow as pa

from d3po_core.errors import D3POError
from d3po_core.intervals import chance_of_as_high, mean_intervals, unit_means, units_of
from d3po_core.records import ScoreSummary
from d3po_core.store.stages import finished_numbers
from d3po_core.store.tables import connect, partition, read_rows

SURE = 0.005

BETTER, WORSE, UNCLEAR = "better", "worse", "no clear difference"


@dataclass(frozen=True)
class Comparison:
    """A checkpoint against a reference, on the same images.

    ``difference`` is the mean of score minus reference score. ``win_rate`` is the share of images on which the
    checkpoint scores higher; a tie counts one half. Both have 95 % intervals over prompts. ``units_U`` are the prompts'
    mean differences.
    """

    num_images: int
    difference: ScoreSummary
    win_rate: ScoreSummary
    units_U: np.ndarray

    @property
    def num_units(self) -> int:
        """Return the number of prompts, or of images if there is only one prompt."""
        return len(self.units_U)

    @property
    def verdict(self) -> str:
        """Return ``better`` or ``worse`` if chance alone gives such a difference in fewer than ``SURE`` of cases."""
        if chance_of_as_high(self.units_U) < SURE:
            return BETTER
        if self.chance_of_as_low() < SURE:
            return WORSE
        return UNCLEAR

    def chance_of_as_low(self, bound: float = 0.0) -> float:
        """Return the one-sided p-value of a difference this low, if its true mean were ``bound``."""
        return chance_of_as_high(-self.units_U, -bound)


@dataclass(frozen=True)
class HeldOut:
    """Held-out scores of R checkpoints on the I images (one prompt and one seed each) that all of them drew."""

    prompts: list[str]  # I
    seeds: list[int]  # I
    scores: dict[str, np.ndarray]  # scorer -> [R, I]; the first is the one that the rounds report
    image_paths: Sequence[list[Path]]  # [R][I]


@dataclass(frozen=True)
class _ImagePaths(Sequence[list[Path]]):
    """The paths of each checkpoint's images, made when asked for: a long campaign has a hundred thousand."""

    folders: list[Path]
    names: np.ndarray  # [R, I]

    def __len__(self) -> int:
        return len(self.folders)

    @overload
    def __getitem__(self, row: int) -> list[Path]: ...
    @overload
    def __getitem__(self, row: slice) -> list[list[Path]]: ...
    def __getitem__(self, row: int | slice) -> list[Path] | list[list[Path]]:
        if isinstance(row, slice):
            return [self[at] for at in range(*row.indices(len(self)))]
        return [self.folders[row] / name for name in self.names[row]]


def compare_rows(scores: np.ndarray, references: np.ndarray, prompts: list[str]) -> list[Comparison]:
    """Compare each row of ``scores`` ``[R, I]`` with the same row of ``references`` ``[R, I]``, image by image."""
    difference_RI = scores - references
    units_RU = unit_means(difference_RI, prompts)
    differences = mean_intervals(units_RU)
    wins = mean_intervals(unit_means((np.sign(difference_RI) + 1) / 2, prompts), shares=True)
    return [
        Comparison(len(prompts), difference, win, units_U)
        for difference, win, units_U in zip(differences, wins, units_RU, strict=True)
    ]


def compare_scores(scores: np.ndarray, reference: np.ndarray, prompts: list[str]) -> Comparison:
    """Compare the scores ``[I]`` of a checkpoint with those of another, image by image (same prompt, same seed)."""
    return compare_rows(scores[None], reference[None], prompts)[0]


def champions(scores: np.ndarray, prompts: list[str]) -> list[int]:
    """Return the champion after each of R checkpoints in order; the first, the base, starts as champion.

    A checkpoint takes over if its mean is higher than the champion's, unless the interval of its paired win rate lies
    below 1/2: a few images may lift a mean that most images lower.

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


def fitted_champion(scores: np.ndarray, prompts: list[str]) -> np.ndarray:
    """Return, for each image, the champion that the other half of the prompts chose, ``[I]``.

    Its scores there, ``scores[rows, range(I)]``, have no selection bias.

    Args:
        scores: ``[R, I]`` of the first scorer, the base first.
        prompts: ``[I]``.
    """
    unit_I, _ = units_of(prompts)
    first, second = half_champions(scores, prompts, (0, 0), np.arange(1, len(scores)))
    return np.where(unit_I % 2 == 0, first, second)


def half_champions(
    scores: np.ndarray, prompts: list[str], reigning: Sequence[int], challengers: np.ndarray
) -> tuple[int, int]:
    """Return the champion's row for the images of each half of the prompts, chosen by the other half.

    Args:
        scores: ``[R, I]`` of the first scorer.
        prompts: ``[I]``.
        reigning: for each half, the row of the champion so far.
        challengers: the rows that came after it, in order.
    """
    unit_I, _ = units_of(prompts)
    chosen = list(reigning)
    for half in (0, 1):
        other_I = unit_I % 2 != half
        if other_I.any() and not other_I.all():
            others = [prompt for prompt, other in zip(prompts, other_I, strict=True) if other]
            rows = np.array([reigning[half], *challengers])
            chosen[half] = int(rows[champions(scores[rows][:, other_I], others)[-1]])
    return chosen[0], chosen[1]


def read_held_out(checkpoints: list[tuple[Path, int]]) -> HeldOut:
    """Read the scores of checkpoints (campaign folder, round) on the prompts and seeds that all share.

    Scorers that only some checkpoints have are left out.

    Raises:
        D3POError: a round is not evaluated, or the checkpoints share no prompt and seed, or no scorer.
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
    count = path_RI.shape[1]
    return HeldOut(
        prompts=found["prompt"][:count].tolist(),
        seeds=found["seed"][:count].tolist(),
        scores=dict(zip(scorers, score_SRI, strict=True)),
        image_paths=_ImagePaths([folder for folder, _ in checkpoints], path_RI),
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
    wanted = [[row, number] for row, (other, number) in enumerate(checkpoints) if other == folder]
    with connect(folder, ("evaluations",), {number for _, number in wanted}) as connection:
        connection.register("wanted", pa.table(dict(zip(("row", "round"), zip(*wanted, strict=True), strict=True))))
        scores = connection.sql(
            """SELECT row, scorer, scorer = $main AS main, prompt, seed, avg(score) AS score, min(image_path) AS path
            FROM evaluations JOIN wanted USING (round) GROUP BY ALL""",
            params={"main": _reported_scorer(folder)},
        ).to_arrow_table()
    into.register("scores", scores)
    into.execute("INSERT INTO held_out SELECT * FROM scores")
    into.unregister("scores")


def _reported_scorer(folder: Path) -> str | None:
    """Return the scorer that the last finished round reports; None if no round is finished."""
    numbers = finished_numbers(folder)
    if not numbers:
        return None
    (row,) = read_rows(partition(folder, "rounds", numbers[-1]) / "part.parquet")
    return str(row["eval_scorer"])


def _recorded_champion(folder: Path, rounds: list[int]) -> int | None:
    """Return the champion by the guard, which may have rejected the best-looking round; None if it recorded none."""
    for number in reversed(rounds):
        (row,) = read_rows(partition(folder, "rounds", number) / "part.parquet")
        if row.get("champion") is not None:
            return int(row["champion"])
    return None


def round_named(folder: Path, name: str) -> int:
    """Return the round for a name: ``base``, ``latest``, ``champion`` or a number.

    Raises:
        D3POError: no finished round has this name.
    """
    rounds = finished_numbers(folder)
    if name == "champion" and rounds:
        if (recorded := _recorded_champion(folder, rounds)) is not None:
            return recorded
        held_out = read_held_out([(folder, number) for number in rounds])
        return rounds[champions(next(iter(held_out.scores.values())), held_out.prompts)[-1]]
    named = {str(number): number for number in rounds} | ({"base": rounds[0], "latest": rounds[-1]} if rounds else {})
    if name not in named:
        raise D3POError(
            f"{name!r} is no finished round of campaign {folder.name!r}; expected base, latest, champion or one of "
            f"{', '.join(map(str, rounds)) or '(it has none yet)'}"
        )
    return named[name]
