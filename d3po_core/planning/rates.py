"""Rates measured on GPUs (``rates.json``), and the seconds that a round's stages take at them."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from d3po_core.config import CampaignConfig, ModelConfig
from d3po_core.planning.model_facts import ModelFacts
from d3po_core.planning.work import Work

RATES_FILE = Path(__file__).with_name("rates.json")


@dataclass(frozen=True)
class Rate:
    """The measured speed of one kind of model in one mode; see the note in ``rates.json``."""

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
    card: str = "NVIDIA H200"
    card_gb: int | None = None

    def fits(self, config: CampaignConfig, facts: ModelFacts, gpu_bytes: int | None) -> bool:
        """Return whether this rate holds for the run's model and mode, with a LoRA on one GPU."""
        model = config.model
        if self.half and model.device == "cpu":
            return False
        drawn = {size or facts.native for size in (*config.sample.image_sizes, config.held_out_size)}
        return (self.family, {(self.pixels, self.pixels)}, self.half, "lora", 1) == (
            facts.family, drawn, model.precision != "no", model.train, config.compute.processes,
        ) and self._has_mode(model, gpu_bytes)  # fmt: skip

    def _has_mode(self, model: ModelConfig, gpu_bytes: int | None) -> bool:
        if self.card_gb is None:
            return (self.memory, self.compile) == (model.memory, model.compile)
        # `auto` uses what there is, so it is at least as fast as on a smaller card; compiling only adds to that.
        return model.memory == "auto" and gpu_bytes is not None and self.card_gb * 1e9 <= gpu_bytes

    def seconds(self, config: CampaignConfig, work: Work) -> dict[str, float]:
        """Return the seconds of each measured stage, assuming that every pass takes equally long."""
        sample, train = config.sample, config.train
        passes = sample.num_steps * (2 if sample.guidance_scale > 1 else 1)
        cost = passes / (self.steps * (2 if self.guided else 1))
        guidance = cost * self.steps / sample.num_steps
        rows = work.trained_images * sample.num_steps * (train.epochs + train.measured_share / 3)
        if train.reference == "base":
            rows += work.trained_images * sample.num_steps / 3
        drift = min(config.evaluate.drift_images, work.held_out_images)
        return {
            "sample": cost * work.images / self.images_per_second,
            "train": guidance * rows / self.image_steps_per_second,
            "evaluate": cost * (work.held_out_images + drift) / self.images_per_second,
        }

    @property
    def source(self) -> str:
        """Return where and on what this was measured, in words."""
        return f"as measured on an {self.card}{self.also} ({_content()['source']}, {self.section!r})"


@cache
def _content() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RATES_FILE.read_text())
    return found


def measured_rate(config: CampaignConfig, facts: ModelFacts, gpu_bytes: int | None = None) -> Rate | None:
    """Return the rate for the run's model and mode on the nearest card; None if not measured.

    Args:
        config: the campaign's configuration.
        facts: what is known of its model.
        gpu_bytes: memory of the GPU; None if there is none.
    """
    rates = [Rate(**rate) for rate in _content()["rates"]]
    fitting = [rate for rate in rates if rate.fits(config, facts, gpu_bytes)]
    return max(fitting, key=lambda rate: rate.card_gb or 0, default=None)
