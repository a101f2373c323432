"""Measured rates of ``rates.json``, and the seconds that a round's stages would take at them."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from d3po_core.config import CampaignConfig
from d3po_core.planning.model_facts import ModelFacts
from d3po_core.planning.work import Work

RATES_FILE = Path(__file__).with_name("rates.json")


@dataclass(frozen=True)
class Rate:
    """What one kind of model and mode reached; see the note in ``rates.json``."""

    family: str
    pixels: int
    memory: str
    compile: bool
    half: bool
    steps: int
    guided: bool
    images_per_second: float
    image_steps_per_second: float
    peak_gb: float | None
    compile_seconds: int
    section: str
    also: str

    def fits(self, config: CampaignConfig, facts: ModelFacts) -> bool:
        """Return whether this was measured on such a model in such a mode, with a LoRA on one GPU."""
        model = config.model
        if self.half and model.device == "cpu":
            return False
        return (self.family, self.pixels, self.memory, self.compile, self.half) == (
            facts.family, facts.pixels, model.memory, model.compile, model.precision != "no",
        ) and (model.train, model.processes) == ("lora", 1)  # fmt: skip

    def seconds(self, config: CampaignConfig, work: Work) -> dict[str, float]:
        """Return the seconds of each measured stage; a pass takes as long at other steps and with other guidance."""
        sample, train = config.sample, config.train
        passes = sample.num_steps * (2 if sample.guidance_scale > 1 else 1)
        cost = passes / (self.steps * (2 if self.guided else 1))
        guidance = cost * self.steps / sample.num_steps
        rows = work.images * sample.num_steps * (train.epochs + train.measured_share / 3)
        if train.reference == "base":
            rows += work.images * sample.num_steps / 3
        drift = min(config.evaluate.drift_images, work.held_out_images)
        return {
            "sample": cost * work.images / self.images_per_second,
            "train": guidance * rows / self.image_steps_per_second,
            "evaluate": cost * (work.held_out_images + drift) / self.images_per_second,
        }

    @property
    def source(self) -> str:
        """Return where and on what this was measured, in words."""
        content = _content()
        return f"as measured on an {content['card']}{self.also} ({content['source']}, {self.section!r})"


@cache
def _content() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RATES_FILE.read_text())
    return found


def measured_rate(config: CampaignConfig, facts: ModelFacts) -> Rate | None:
    """Return the rate that was measured on such a model in such a mode; None if there is none."""
    rates = [Rate(**rate) for rate in _content()["rates"]]
    return next((rate for rate in rates if rate.fits(config, facts)), None)
