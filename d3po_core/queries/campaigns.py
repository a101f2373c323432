"""One row per campaign of a folder: rounds, scores, champion, size."""

import math
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb

from d3po_core.errors import D3POError
from d3po_core.records import ScoreSummary
from d3po_core.store.campaign import CAMPAIGN_FILE
from d3po_core.store.stages import stage_path
from d3po_core.store.tables import connect


@dataclass(frozen=True)
class CampaignSummary:
    """A campaign at a glance.

    Attributes:
        name: the campaign's name.
        rounds: number of finished rounds that trained.
        num_images: images sampled for training.
        scorer: scorer of the held-out scores; None before round 0 is finished, like all that follows.
        first: held-out score of the base model.
        last: held-out score of the last finished round.
        best: held-out score of the champion.
        champion: the champion's round; 0 is the base model.
        waiting: the round that waits for people, if one does.
        changed_at: when its last round was finished, UTC.
        problem: why the campaign cannot be read; then nothing else is known.
    """

    name: str
    rounds: int = 0
    num_images: int = 0
    scorer: str | None = None
    first: ScoreSummary | None = None
    last: ScoreSummary | None = None
    best: ScoreSummary | None = None
    champion: int | None = None
    waiting: int | None = None
    changed_at: datetime | None = None
    problem: str | None = None


def campaign_summaries(runs: Path) -> list[CampaignSummary]:
    """Return a summary of each campaign in a folder, by name; a damaged one has a ``problem`` instead."""
    return [campaign_summary(path.parent) for path in sorted(runs.glob(f"*/{CAMPAIGN_FILE}"))]


def campaign_summary(campaign: Path) -> CampaignSummary:
    """Return a campaign's summary, with a ``problem`` if its tables cannot be read."""
    try:
        with connect(campaign) as connection:
            rows = connection.sql("SELECT * FROM rounds ORDER BY round").to_arrow_table().to_pylist()
    except (D3POError, duckdb.Error) as error:
        return CampaignSummary(campaign.name, problem=str(error))
    waiting = _waiting(campaign, rows[-1]["round"] + 1 if rows else 1)
    if not rows:
        return CampaignSummary(campaign.name, waiting=waiting)
    scores = {row["round"]: _score(row) for row in rows}
    champion = rows[-1]["champion"]
    return CampaignSummary(
        name=campaign.name,
        rounds=len(rows) - 1,
        num_images=sum(row["num_samples"] for row in rows),
        scorer=rows[-1]["eval_scorer"],
        first=scores[rows[0]["round"]],
        last=scores[rows[-1]["round"]],
        best=scores.get(champion),
        champion=champion,
        waiting=waiting,
        changed_at=rows[-1]["finished_at"].replace(tzinfo=UTC),
    )


def _score(row: dict[str, Any]) -> ScoreSummary:
    low, high = row["eval_score_low"], row["eval_score_high"]  # null: too few prompts for an interval
    return ScoreSummary(
        mean=row["eval_score_mean"], low=-math.inf if low is None else low, high=math.inf if high is None else high
    )


def _waiting(campaign: Path, unfinished: int) -> int | None:
    waits = stage_path(campaign, unfinished, "waiting").exists()
    return unfinished if waits and not stage_path(campaign, unfinished, "label").exists() else None
