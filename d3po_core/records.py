"""Small records that stages leave on disk and hand to each other: paths and counts, never tensors.

Paths are relative to the campaign's folder. ``seconds`` is the wall time of the attempt that finished the stage.
"""

from datetime import datetime

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """What every stage records."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seconds: float = 0.0
    finished_at: datetime | None = None


class SampleRecord(Record):
    """Images of a round are on disk."""

    num_samples: int
    checkpoint: str | None
    contact_sheet: str


class JudgeRecord(Record):
    """Judgements of a round are on disk; mean score of each scorer."""

    num_judgements: int
    mean_scores: dict[str, float]


class DeriveRecord(Record):
    """Preferences of a round are on disk."""

    num_pairs: int
    num_ties: int
    mean_agreement: float | None


class TrainRecord(Record):
    """The round's checkpoint is on disk; means over its updates are None when there was no pair to train on."""

    checkpoint: str
    lora_sha256: str
    num_updates: int
    loss: float | None
    margin: float | None
    pair_accuracy: float | None
    kl: float | None
    clip_fraction: float | None


class ScoreSummary(BaseModel):
    """Mean held-out score with its 95 % bootstrap interval."""

    model_config = ConfigDict(frozen=True)

    mean: float
    low: float
    high: float


class EvaluateRecord(Record):
    """Held-out images of a checkpoint are on disk, scored."""

    num_images: int
    scores: dict[str, ScoreSummary]
    grid: str


class RoundRecord(Record):
    """A finished round, as its row in ``rounds`` says."""

    round: int
    num_pairs: int
    num_ties: int
    eval_scorer: str
    score: ScoreSummary
    checkpoint: str | None
    mlflow_run_id: str | None
    stage_seconds: dict[str, float]
