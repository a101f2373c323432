"""Jobs that carry much, or tell which model a worker found. Not tests themselves."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from d3po_core.config import CampaignConfig
from d3po_core.processes.job import Files, Made, QueueJob

HEAVY_BYTES = 120_000_000
HEAVY_FILE = "heavy.bin"


def _none(config: CampaignConfig, round_number: int) -> list[str]:
    return []


def _one(config: CampaignConfig, round_number: int) -> list[int]:
    return [0]


def _keep(config: CampaignConfig, round_number: int, files: Files) -> None:
    pass


def large(config: CampaignConfig, round_number: int, items: Iterable[int | None]) -> Iterator[Made]:
    """One item whose file is larger than the tests' object store."""
    yield Made(0, 1, {HEAVY_FILE: bytes(HEAVY_BYTES)})


def model_text(config: CampaignConfig, round_number: int, items: Iterable[int | None]) -> Iterator[Made]:
    """What the model's two places hold on the worker."""
    folder, single = Path(str(config.model.path)), Path(str(config.model.single_file_config))
    yield Made(0, 1, {}, [(folder / "unet" / "weights.bin").read_text(), (single / "index.json").read_text()])


HEAVY = QueueJob("tests.tasks.heavy_jobs:HEAVY", _one, lambda config, number: [HEAVY_FILE], (), large, _keep, list)
LARGE = QueueJob("tests.tasks.heavy_jobs:LARGE", _one, _none, (), large, _keep, list)
MODEL_TEXT = QueueJob("tests.tasks.heavy_jobs:MODEL_TEXT", _one, _none, (), model_text, _keep, list)
