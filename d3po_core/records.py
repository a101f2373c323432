"""Small records that stages leave on disk and hand to each other: paths and counts, never tensors.

Paths are relative to the campaign's folder. ``seconds`` is the wall time of all attempts at the stage; of one that was
killed, until it last told of progress.
"""

import math
from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, model_validator


class Record(BaseModel):
    """What every stage records."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seconds: float = 0.0
    finished_at: datetime | None = None


class SampleRecord(Record):
    """Images of a round are on disk; how many prompts the round could draw from, and their digest: they may change."""

    num_samples: int
    checkpoint: str | None
    contact_sheet: str
    num_prompts: int | None = None
    prompts_sha256: str | None = None


class JudgeRecord(Record):
    """Judgements of a round are on disk; mean score of each scorer."""

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


# A larger share of the weights whose gradient is below AdamW's eps is worth a word.
DROWNED = 0.1


class TrainRecord(Record):
    """The round's checkpoint is on disk; means over its updates are None when there was no pair to train on.

    ``loss`` and what ends in ``_before`` are of the policy that each update found; ``_after``, of the policy after the
    last one, on a share of the same pairs, None when not measured. Margins are log-ratios; KLs are to the policy that
    sampled the round, in nats per element and step. ``drowned`` is the share of the weights whose gradient was below
    AdamW's eps.
    ``failure`` says why training ended before its last update; the checkpoint is then that of the update before.
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
    drowned: float | None = None
    failure: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _former_names(cls, values: Any) -> Any:
        if not isinstance(values, dict) or "margin" not in values:
            return values
        kept = {name: value for name, value in values.items() if name not in ("margin", "pair_accuracy", "kl")}
        # What was called kl was none.
        former = {"margin_before": values["margin"], "pair_accuracy_before": values["pair_accuracy"], "kl_before": None}
        return kept | former


class ScoreSummary(BaseModel):
    """Mean held-out score with its 95 % interval over prompts; infinite ends when there are too few to tell."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    mean: float
    low: float
    high: float

    @property
    def ends(self) -> tuple[float | None, float | None]:
        """Both ends for a table or a chart: None where there is no interval."""
        low, high = (end if math.isfinite(end) else None for end in (self.low, self.high))
        return low, high

    def __str__(self) -> str:
        """The mean and its interval, or that there is none."""
        return self._told("")

    @property
    def signed(self) -> str:
        """A difference and its interval, with their signs."""
        return self._told("+")

    def _told(self, sign: str) -> str:
        low, high = self.ends
        told = "too few to tell" if low is None or high is None else f"{low:{sign}.3f}, {high:{sign}.3f}"
        return f"{self.mean:{sign}.3f} [{told}]"


class EvaluateRecord(Record):
    """Held-out images of a checkpoint are on disk, scored.

    ``diversity`` is the mean difference of images of one prompt, 0 to 1; ``drift`` the KL from the base model over a
    trajectory, nats per element.
    """

    num_images: int
    scores: dict[str, ScoreSummary]
    grid: str
    diversity: float | None = None
    drift: float | None = None


class GuardRecord(Record):
    """Whether a round's checkpoint is trusted.

    ``findings`` says what is wrong; ``go_on_from`` is the round whose checkpoint the next round starts from;
    ``champion`` the best round so far that was not rejected.
    """

    verdict: Literal["ok", "warned", "rejected", "stopped"]
    findings: list[str]
    go_on_from: int
    champion: int
    win_rates: dict[str, ScoreSummary]


class RoundRecord(Record):
    """A finished round, as its row in ``rounds`` says."""

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
