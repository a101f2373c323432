"""Marks beside the stages' records: which MLflow store already has what.

A mark holds the ids of the campaign's MLflow runs that got the stage. Another server, or a run that was made again, has
nothing yet. Marks of earlier versions are empty; they count for a store that holds the campaign when first asked.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from d3po_core.store.files import atomic_path
from d3po_core.store.stages import stage_path

# Written into an earlier version's mark that is not this store's; a second delivery changes nothing.
ELSEWHERE = "another store"


def mark_path(campaign: Path, round_number: int, stage: str) -> Path:
    """Path of a stage's mark."""
    return stage_path(campaign, round_number, stage).with_suffix(".delivered")


def is_marked(path: Path, campaign_run: str) -> bool:
    """Return whether the store of this campaign's run was told."""
    return path.exists() and campaign_run in path.read_text().splitlines()


def mark(path: Path, campaign_run: str) -> None:
    """Note that the store of this campaign's run was told."""
    lines = path.read_text().splitlines() if path.exists() else []
    if campaign_run not in lines:
        with atomic_path(path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in [*lines, campaign_run]))


def has_old_marks(campaign: Path) -> bool:
    """Return whether marks name no store; if an earlier version made some, one of the last two rounds has some."""
    begun = sorted(int(path.name.removeprefix("round=")) for path in campaign.glob("stages/round=*"))
    return any(path for number in begun[-2:] for path in _old_marks(campaign, f"round={number}"))


def name_old_marks(campaign: Path, campaign_run: str | None) -> None:
    """Assign the marks of an earlier version to a store.

    Args:
        campaign: the campaign's folder.
        campaign_run: the campaign's run in the current store; None if it has none.
    """
    for path in list(_old_marks(campaign)):
        mark(path, campaign_run or ELSEWHERE)


def _old_marks(campaign: Path, rounds: str = "round=*") -> Iterator[Path]:
    return (path for path in campaign.glob(f"stages/{rounds}/*.delivered") if not path.stat().st_size)


def told(path: Path, campaign_run: str) -> str | None:
    """The latest value that the store of this campaign's run was told, None if it was told none."""
    return _all_told(path).get(campaign_run)


def note_told(path: Path, campaign_run: str, what: str) -> None:
    """Note the value that the store of this campaign's run was told."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(_all_told(path) | {campaign_run: what}))


def _all_told(path: Path) -> dict[str, str]:
    known = json.loads(path.read_text()) if path.exists() else {}
    return {run: what for run, what in known.items() if isinstance(what, str)}
