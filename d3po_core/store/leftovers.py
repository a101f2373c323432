"""Remove files: what killed runs and commands left, an unwanted unfinished round, a whole campaign."""

import contextlib
import os
import shutil
import uuid
from pathlib import Path

import psutil

from d3po_core.errors import D3POError
from d3po_core.store.campaign import CAMPAIGN_FILE
from d3po_core.store.files import disk_errors
from d3po_core.store.goals import TARGET_FILE
from d3po_core.store.stages import last_finished_round
from d3po_core.store.tables import SCHEMAS, partition

# Imports, reports, pictures and comparisons of any round are written without the lock.
_UNLOCKED = (
    ".*.tmp",
    "report/.*.tmp",
    "judgements/*/.*.tmp",
    "image_reports/*/.*.tmp",
    "comparisons/.*.tmp",
    "comparisons/*/.*.tmp",
)


def sweep_leftovers(campaign: Path, round_number: int) -> None:
    """Remove the half-written files of a killed run or command; the caller holds the campaign's lock.

    Args:
        campaign: the campaign's folder.
        round_number: the round in which the run wrote.
    """
    unlocked = {path for pattern in _UNLOCKED for path in campaign.glob(pattern)}
    locked = {
        path for pattern in (f"*/round={round_number}/.*.tmp", "checkpoints/.*.tmp") for path in campaign.glob(pattern)
    }
    for path in (locked - unlocked) | {path for path in unlocked if not _in_hands(path)}:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _in_hands(path: Path) -> bool:
    """Return whether another living process, whose id ends the file's name, is writing a temporary file."""
    pid = path.name.removesuffix(".tmp").rpartition(".")[2]
    return pid.isdigit() and int(pid) != os.getpid() and psutil.pid_exists(int(pid))


def delete_campaign(campaign: Path) -> None:
    """Delete a campaign's folder and nothing else; half of it never stays behind as a campaign.

    The caller holds the campaign's lock.

    Raises:
        D3POError: the folder is a link, or cannot be deleted.
    """
    require_no_link(campaign)
    leaving = campaign.with_name(f".deleted-{campaign.name}-{uuid.uuid4().hex[:8]}")
    with disk_errors(campaign):
        campaign.rename(leaving)
        with contextlib.suppress(FileNotFoundError):  # after this, nothing takes it for a campaign
            (leaving / CAMPAIGN_FILE).rename(leaving / f".{CAMPAIGN_FILE}")
        shutil.rmtree(leaving)


def require_no_link(campaign: Path) -> None:
    """Refuse a campaign's folder that is a link.

    Raises:
        D3POError: it is one.
    """
    if campaign.is_symlink():
        raise D3POError(f"{campaign} is a link, so its campaign lies elsewhere; remove the link by hand")


def discard_round(campaign: Path) -> int | None:
    """Delete the files of the unfinished round; return its number, or None if there is none."""
    number = last_finished_round(campaign) + 1
    if not (campaign / "stages" / f"round={number}").exists():
        return None
    stages = campaign / "stages" / f"round={number}"
    # The round's configuration goes last, so that the next call can finish an interrupted discard.
    for path in stages.iterdir():
        if path.name != "config.json":
            path.unlink()
    for table in SCHEMAS:
        shutil.rmtree(partition(campaign, table, number), ignore_errors=True)
    for folder in ("images", "trajectories", "staging", "checkpoints"):
        for path in (campaign / folder).glob(f"*round={number}*"):
            if path.name in (f"round={number}", f".round={number}.tmp") or path.name.startswith(f"round={number}-"):
                shutil.rmtree(path)
    (campaign / TARGET_FILE).unlink(missing_ok=True)
    shutil.rmtree(stages)
    return number
