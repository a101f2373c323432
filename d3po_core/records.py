"""Small records that stages write to disk and pass on: paths and counts, never tensors.

Paths are relative to the campaign's folder. ``seconds`` is the wall time of all attempts at the stage; a killed attempt
counts up to its last report of progress.
"""

import math
from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, model_validator


class Record(BaseModel):
    """The fields that every stage records."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seconds: float = 0.0
    finished_at: datetime | None = None


class SampleRecord(Record):
    """Images of a round are on disk; records how many prompts it drew from and their digest, as they may change.

    Without a checkpoint and prompts if it is round 1 or all images come from a data set.
    """

    num_samples: int
    checkpoint: str | None
    contact_sheet: str
    num_prompts: int | None = None
    prompts_sha256: str | None = None


class JudgeRecord(Record):
    """Judgements of a round are on disk; records each scorer's mean score."""

    num_judgements: int
    mean_scores: dict[str, float]


class LabelRecord(Record):
    """People's judgements of a round are in the tables.

    ``ended``: complete (all that was needed), asked (a person said to go on), go_on or proxy (the deadline's policy).
    """

    ended: Literal["complete", "asked", "go_on", "proxy"]
    groups_needed: int
    groups_done: int
    num_judgements: int
    num_raters: int
    waited_seconds: float


class DeriveRecord(Record):
    """Preferences of a round are on disk."""

    num_pairs: int
    num_ties: int
    mean_agreement: float | None


# Warn if more than this share of the weights has a gradient below AdamW's eps.
DROWNED = 0.1


class TrainRecord(Record):
    """The round's checkpoint is on disk; means over its updates are None if there was no pair to train on.

    ``loss`` and fields ending in ``_before`` measure the policy before each update. Fields ending in ``_after`` measure
    the policy after the last update, on a share of the same pairs; None if not measured. Margins are log-ratios. KLs
    are to the policy that sampled the round, in nats per element and step. ``winner_error_after`` and
    ``loser_error_after`` are minus the log-ratios of winners and losers; ``neutral_error_after`` is what a move in a
    random direction of the same KL would raise both by. ``drowned`` is the share of the weights
    whose gradient was below AdamW's eps. ``failure`` says why training ended before its last update; the checkpoint
    is then that of the update before.
    """

    checkpoint: str
    lora_sha256: str
    num_updates: int
    loss: float | None
    margin_before: float | None
    pair_accuracy_before: float | None
    kl_before: float | None
    clip_fraction: float | None
    margin_after: float | None = None
    pair_accuracy_after: float | None = None
    kl_after: float | None = None
    winner_error_after: float | None = None
    loser_error_after: float | None = None
    neutral_error_after: float | None = None
    gradient_factor: float | None = None
    drowned: float | None = None
    failure: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _former_names(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "margin" not in values:
            return values
        kept = {name: value for name, value in values.items() if name not in ("margin", "pair_accuracy", "kl")}
        # The old field kl was not a KL.
        former = {"margin_before": values["margin"], "pair_accuracy_before": values["pair_accuracy"], "kl_before": None}
        return kept | former


class ScoreSummary(BaseModel):
    """Mean held-out score with its 95 % interval over prompts; infinite ends if there are too few prompts."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    mean: float
    low: float
    high: float

    @property
    def ends(self) -> tuple[float | None, float | None]:
        """Return both ends for a table or a chart; None for an infinite end."""
        low, high = (end if math.isfinite(end) else None for end in (self.low, self.high))
        return low, high

    def __str__(self) -> str:
        """Return the mean and its interval, or that there are too few to tell."""
        return self._told("")

    @property
    def signed(self) -> str:
        """Return a difference and its interval, with signs."""
        return self._told("+")

    def _told(self, sign: str) -> str:
        low, high = self.ends
        told = "too few to tell" if low is None or high is None else f"{low:{sign}.3f}, {high:{sign}.3f}"
        return f"{self.mean:{sign}.3f} [{told}]"


class EvaluateRecord(Record):
    """Held-out images of a checkpoint are on disk and scored.

    ``diversity`` is the mean difference of images of one prompt, 0 to 1. ``drift`` is the KL from the base model over a
    trajectory, in nats per element.
    """

    num_images: int
    scores: dict[str, ScoreSummary]
    grid: str
    diversity: float | None = None
    drift: float | None = None


class GuardRecord(Record):
    """The guard's verdict on a round's checkpoint.

    ``findings`` says what is wrong. ``go_on_from`` is the round whose checkpoint the next round starts from.
    ``champion`` is the best round so far that was not rejected.
    """

    verdict: Literal["ok", "warned", "rejected", "stopped"]
    findings: list[str]
    go_on_from: int
    champion: int
    win_rates: dict[str, ScoreSummary]


class RoundRecord(Record):
    """A finished round, from its row in ``rounds``."""

    round: int
    verdict: str | None = None
    findings: str | None = None
    num_pairs: int
    num_ties: int
    eval_scorer: str
    score: ScoreSummary
    checkpoint: str | None
    mlflow_run_id: str | None
    stage_seconds: dict[str, float]
