"""What campaigns there are, and how far each one is."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from d3po_core.errors import D3POError
from d3po_core.paths import data_folder
from d3po_core.people.questions import label_progress, waiting_round
from d3po_core.records import ScoreSummary
from d3po_core.store.campaign import LOCK_FILE, campaign_named, campaign_names, rules_of
from d3po_core.store.stages import finished_round, last_finished_round
from d3po_core.store.tables import partition, read_rows


@dataclass(frozen=True)
class CampaignState:
    """How far a campaign is.

    Attributes:
        name: the campaign's name.
        folder: where it lies.
        rounds: number of finished rounds; -1 if not even the base is evaluated.
        scorer: the scorer of ``score``.
        score: the last round's held-out score.
        base: the base model's held-out score.
        champion: the best round that the guard trusts; 0 is the base.
        best: the champion's held-out score.
        megabytes: the size of its files.
        waits_for: the questions that people have yet to answer; None if it waits for nobody.
        changed: when a file last changed.
        problem: why the campaign cannot be read, in one line.
    """

    name: str
    folder: Path
    megabytes: float
    changed: datetime
    rounds: int = -1
    scorer: str | None = None
    score: ScoreSummary | None = None
    base: ScoreSummary | None = None
    champion: int | None = None
    best: ScoreSummary | None = None
    waits_for: str | None = None
    problem: str | None = None


def campaign_states() -> list[CampaignState]:
    """Return the state of each campaign in the data folder, by name; one that is damaged does not hide the others."""
    return [campaign_state(name) for name in campaign_names()]


def campaign_state(name: str) -> CampaignState:
    """Return the state of one campaign.

    Raises:
        D3POError: there is no such campaign.
    """
    try:
        folder, problem = campaign_named(name).folder, None
    except D3POError as error:
        if name not in campaign_names():
            raise
        folder, problem = data_folder() / "runs" / name, str(error)
    found = list(_sizes(folder))
    megabytes = sum(size for size, _ in found) / 1e6
    changed = datetime.fromtimestamp(max((time for _, time in found), default=0.0), UTC)
    if problem:
        return CampaignState(name, folder, megabytes, changed, problem=problem)
    try:
        standing = _standing(folder)
    except (D3POError, OSError) as error:
        standing = {"problem": " ".join(str(error).split())}
    return CampaignState(name, folder, megabytes, changed, **standing)


def _standing(folder: Path) -> dict[str, Any]:
    """Return what the rows of its first, last and best rounds say, and whom it waits for."""
    found: dict[str, Any] = {"rounds": last_finished_round(folder), "waits_for": _waits_for(folder)}
    if found["rounds"] < 0:
        return found
    last = finished_round(folder, found["rounds"])
    champion = read_rows(partition(folder, "rounds", last.round) / "part.parquet")[0].get("champion")
    found |= {"scorer": last.eval_scorer, "score": last.score, "base": finished_round(folder, 0).score}
    return found | {
        "champion": champion, "best": None if champion is None else finished_round(folder, champion).score
    }  # fmt: skip


def _waits_for(folder: Path) -> str | None:
    number = waiting_round(folder)
    if number is None:
        return None
    config = rules_of(folder, number)
    if config.judge.labeller == "proxy":
        return None
    progress = label_progress(config, number)
    left = progress.groups_needed - progress.groups_done
    return f"{left} of {progress.groups_needed} groups" if left > 0 else None


def _sizes(folder: Path) -> Iterator[tuple[int, float]]:
    """Size and time of each file."""
    for parent, _, names in os.walk(folder):
        for name in names:
            if name != LOCK_FILE:
                try:
                    found = os.lstat(os.path.join(parent, name))
                except OSError:  # a run has just removed it
                    continue
                yield found.st_size, found.st_mtime
