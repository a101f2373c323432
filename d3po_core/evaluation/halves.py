"""Which checkpoints the halves of the prompts chose, remembered between the rounds of a process.

The guard asks this every round. Only the rounds since its last question can change the answer, so a long run reads a
few rounds' scores in place of all.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from d3po_core.evaluation.comparison import HeldOut, half_champions, read_held_out
from d3po_core.records import GuardRecord
from d3po_core.store.stages import read_record, stage_path
from d3po_core.store.tables import partition


@dataclass(frozen=True)
class _Chosen:
    """The rounds that the halves chose among those before ``upto``; the rest says for which images this holds."""

    upto: int = 1
    rounds: tuple[int, int] = (0, 0)
    compared: tuple[list[str], list[int], list[str], str] | None = None  # prompts, seeds, scorers, the one that chose
    base: tuple[int, int] | None = None  # the base's file


_known: dict[Path, _Chosen] = {}


def read_with_chosen(
    folder: Path, round_number: int, scorer: str, needed: Iterable[int]
) -> tuple[HeldOut, dict[int, int], tuple[int, int]]:
    """Return a round's held-out scores beside earlier ones, their rows by round, and the round that each half chose.

    Args:
        folder: the campaign's folder.
        round_number: a round that is evaluated; its scores are the last row.
        scorer: chooses among the earlier rounds that the guard accepted.
        needed: earlier rounds whose scores the caller needs.

    Raises:
        D3POError: a needed record or table is missing or damaged.
    """
    file = (partition(folder, "evaluations", 0) / "part.parquet").stat()
    base, known = (file.st_ino, file.st_mtime_ns), _known.get(folder, _Chosen())
    if known.base == base and known.upto <= round_number:
        held_out, at, chosen = _advance(folder, round_number, scorer, needed, known)
        found = _Chosen(round_number, chosen, _compared(held_out, scorer), base)
        if found.compared == known.compared:
            _known[folder] = found
            return held_out, at, chosen
    # The first question of a process, or other prompts or scorers than before: ask all rounds.
    held_out, at, chosen = _advance(folder, round_number, scorer, needed, _Chosen())
    _known[folder] = _Chosen(round_number, chosen, _compared(held_out, scorer), base)
    return held_out, at, chosen


def _compared(held_out: HeldOut, scorer: str) -> tuple[list[str], list[int], list[str], str]:
    return held_out.prompts, held_out.seeds, list(held_out.scores), scorer


def _advance(
    folder: Path, round_number: int, scorer: str, needed: Iterable[int], known: _Chosen
) -> tuple[HeldOut, dict[int, int], tuple[int, int]]:
    challengers = [number for number in range(known.upto, round_number) if _trusted(folder, number)]
    numbers = [*sorted({0, *known.rounds, *challengers, *needed}), round_number]
    held_out = read_held_out([(folder, number) for number in numbers])
    at = {number: row for row, number in enumerate(numbers)}
    first, second = half_champions(
        held_out.scores[scorer], held_out.prompts, [at[number] for number in known.rounds],
        np.array([at[number] for number in challengers], dtype=int),
    )  # fmt: skip
    return held_out, at, (numbers[first], numbers[second])


def _trusted(folder: Path, round_number: int) -> bool:
    """Return whether the guard accepted a finished round's checkpoint; rounds older than the guard are trusted."""
    if not stage_path(folder, round_number, "guard").exists():
        return True
    return read_record(folder, round_number, "guard", GuardRecord).verdict not in ("rejected", "stopped")
