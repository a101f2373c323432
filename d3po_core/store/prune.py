"""Free disk space by deleting what a finished round can make again from the rest.

This drops trajectories, which a replay samples anew, staging, and half-written files. Latents of a data set's images
stay, since nothing can make them again. Tables, images, checkpoints with
their optimizer states, and stage records stay: you can still compare rounds, regenerate images and replay training.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from d3po_core.errors import D3POError
from d3po_core.image_ids import is_imported
from d3po_core.store.files import disk_errors
from d3po_core.store.integrity import require_whole
from d3po_core.store.stages import finished_numbers
from d3po_core.store.tables import SCHEMAS

DROPPED = ("trajectories", "staging")
KEPT = ("images", "checkpoints", "tables", "other")


@dataclass(frozen=True)
class KindUsage:
    """Files and bytes of one kind: in total, and how much of that is dropped."""

    kind: str
    files: int
    bytes: int
    dropped_files: int
    dropped_bytes: int


@dataclass(frozen=True)
class PrunePlan:
    """The files that a pruning removes, with folders left empty; ``usage`` has one row per kind of file."""

    rounds: tuple[int, ...]
    files: tuple[Path, ...]
    usage: tuple[KindUsage, ...]

    @property
    def bytes(self) -> int:
        """Return the bytes that the pruning frees."""
        return sum(kind.dropped_bytes for kind in self.usage)


def plan_prune(campaign: Path, keep_rounds: int = 0) -> PrunePlan:
    """Return what can be deleted from a campaign's finished rounds, without deleting it.

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
    """Delete what a plan names; the caller holds the campaign's lock. After a kill, a second call does the rest.

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
    """Return whether a file, by its path in the campaign, belongs to a finished round and can go."""
    kind, *inner = parts
    if not inner:
        return False
    if kind in DROPPED:
        return inner[0] in names and not (kind == "trajectories" and is_imported(inner[-1]))
    if kind == "checkpoints":  # progress of a killed training, and a checkpoint that was being written
        return any(inner[0].startswith((f"{name}-update=", f".{name}.tmp", f".{name}-update=")) for name in names)
    # People's answers arrive without the campaign's lock, so a temporary file there may still be in use.
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
