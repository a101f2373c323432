"""What of a campaign was delivered to which MLflow store: marks beside the records of stages.

A mark holds the ids of the campaign's MLflow runs that were told: another server, or a run that was made again, knows
nothing yet. Marks of earlier versions are empty; they count for a store that holds the campaign when it is first asked.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from d3po_core.store.files import atomic_path
from d3po_core.store.stages import stage_path

# Stands in a mark of an earlier version that was not this store's: delivering twice changes nothing.
ELSEWHERE = "another store"


def mark_path(campaign: Path, round_number: int, stage: str) -> Path:
    """The mark of a stage."""
    return stage_path(campaign, round_number, stage).with_suffix(".delivered")


def is_marked(path: Path, campaign_run: str) -> bool:
    """Whether the store of this campaign's run was told."""
    return path.exists() and campaign_run in path.read_text().splitlines()


def mark(path: Path, campaign_run: str) -> None:
    """Note that the store of this campaign's run was told."""
    lines = path.read_text().splitlines() if path.exists() else []
    if campaign_run not in lines:
        with atomic_path(path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in [*lines, campaign_run]))


def has_old_marks(campaign: Path) -> bool:
    """Whether there are marks that do not say of which store they are."""
    return next(_old_marks(campaign), None) is not None


def name_old_marks(campaign: Path, campaign_run: str | None) -> None:
    """Say of which store the marks of an earlier version are.

    Args:
        campaign: the campaign's folder.
        campaign_run: the campaign's run in the store that is asked now; None when it had none.
    """
    for path in list(_old_marks(campaign)):
        mark(path, campaign_run or ELSEWHERE)


def _old_marks(campaign: Path) -> Iterator[Path]:
    return (path for path in campaign.glob("stages/round=*/*.delivered") if not path.stat().st_size)


def told(path: Path, campaign_run: str) -> str | None:
    """What the store of this campaign's run was told last, of something that changes."""
    return _all_told(path).get(campaign_run)


def note_told(path: Path, campaign_run: str, what: str) -> None:
    """Note what the store of this campaign's run was told."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(_all_told(path) | {campaign_run: what}))


def _all_told(path: Path) -> dict[str, str]:
    known = json.loads(path.read_text()) if path.exists() else {}
    return {run: what for run, what in known.items() if isinstance(what, str)}
