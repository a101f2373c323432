"""Give disk space back: what a finished round no longer needs, because it can be made again from what stays.

Dropped are trajectories (sampled anew by a replay), staging, and half-written files. Tables, images, checkpoints with
their optimizer states and stage records stay: rounds can be compared, images regenerated, training replayed.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from d3po_core.errors import D3POError
from d3po_core.store.files import disk_errors
from d3po_core.store.integrity import require_whole
from d3po_core.store.stages import finished_numbers
from d3po_core.store.tables import SCHEMAS

DROPPED = ("trajectories", "staging")
KEPT = ("images", "checkpoints", "tables", "other")


@dataclass(frozen=True)
class KindUsage:
    """Files and bytes of one kind: all that there are, and what of them is dropped."""

    kind: str
    files: int
    bytes: int
    dropped_files: int
    dropped_bytes: int


@dataclass(frozen=True)
class PrunePlan:
    """What a pruning removes: files, and folders that are then empty; ``usage`` has a row a kind of file."""

    rounds: tuple[int, ...]
    files: tuple[Path, ...]
    usage: tuple[KindUsage, ...]

    @property
    def bytes(self) -> int:
        """Bytes that are given back."""
        return sum(kind.dropped_bytes for kind in self.usage)


def plan_prune(campaign: Path, keep_rounds: int = 0) -> PrunePlan:
    """What can go of a campaign's finished rounds; looks only.

    Args:
        campaign: the campaign's folder.
        keep_rounds: leave this many of the last finished rounds as they are.

    Raises:
        D3POError: ``keep_rounds`` is negative, or what would stay is damaged.
    """
    if keep_rounds < 0:
        raise D3POError(f"--keep-rounds is {keep_rounds}; expected 0 or more")
    finished = finished_numbers(campaign)
    rounds = finished[: max(0, len(finished) - keep_rounds)]
    require_whole(campaign, rounds, (*SCHEMAS, "stages", "checkpoints"))  # what stays has to make again what goes
    names = {f"round={number}" for number in rounds}
    sizes = dict(sorted(_sizes(campaign)))
    files = [path for path in sizes if _droppable(path.relative_to(campaign).parts, names)]
    return PrunePlan(tuple(rounds), tuple(files), tuple(_usage(campaign, sizes, set(files))))


def apply_prune(campaign: Path, plan: PrunePlan) -> None:
    """Remove what a plan names; the caller holds the campaign's lock. Done again after a kill, it does the rest.

    Raises:
        D3POError: a file cannot be removed.
    """
    for path in plan.files:
        with disk_errors(path):
            path.unlink(missing_ok=True)
    folders = {path.parent for path in plan.files}
    for folder in sorted(folders, key=lambda folder: len(folder.parts), reverse=True):  # the inner ones first
        with contextlib.suppress(OSError):  # others still have files
            folder.rmdir()


def _droppable(parts: tuple[str, ...], names: set[str]) -> bool:
    """Whether a file, by its path in the campaign, belongs to a finished round and can go."""
    kind, *inner = parts
    if not inner:
        return False
    if kind in DROPPED:
        return inner[0] in names
    if kind == "checkpoints":  # progress of a killed training, and a checkpoint that was being written
        return any(inner[0].startswith((f"{name}-update=", f".{name}.tmp", f".{name}-update=")) for name in names)
    # What people say comes in without the campaign's lock: a temporary file there may be in somebody's hands.
    half_written = inner[-1].startswith(".") and inner[-1].endswith(".tmp")
    return half_written and inner[0] in names and kind not in ("judgements", "comparisons")


def _sizes(campaign: Path) -> Iterator[tuple[Path, int]]:
    for folder, _, names in os.walk(campaign):
        for name in names:
            path = Path(folder, name)
            with contextlib.suppress(FileNotFoundError):  # a running round renames its files
                yield path, path.lstat().st_size


def _usage(campaign: Path, sizes: dict[Path, int], dropped: set[Path]) -> list[KindUsage]:
    rows = {kind: [0, 0, 0, 0] for kind in (*DROPPED, *KEPT)}
    for path, size in sizes.items():
        first = path.relative_to(campaign).parts[0]
        kind = "tables" if first in SCHEMAS else first if first in rows else "other"
        gone = path in dropped
        for column, value in enumerate((1, size, gone, gone * size)):
            rows[kind][column] += value
    return [KindUsage(kind, *counts) for kind, counts in rows.items()]
