"""How long a round will take: by the campaign's own rounds, else by measured rates, else unknown."""

import itertools
import statistics
from dataclasses import dataclass, field

from d3po_core.config import CampaignConfig
from d3po_core.planning.model_facts import ModelFacts
from d3po_core.planning.rates import measured_rate
from d3po_core.planning.work import Work, round_work
from d3po_core.store.campaign import round_config
from d3po_core.store.stages import finished_numbers, finished_round

LAST_ROUNDS = 5
NO_MEASUREMENT = "no measurement of such a model in such a mode; the first round will tell"


@dataclass(frozen=True)
class Timing:
    """Seconds of a round's stages, and where they come from; empty if unknown.

    ``once`` is what the first round of a process takes more, to compile.
    """

    stages: dict[str, float] = field(default_factory=dict)
    source: str = NO_MEASUREMENT
    once: float = 0.0

    @property
    def seconds(self) -> float | None:
        """Return the seconds of a round after round 0; None if unknown."""
        return sum(self.stages.values()) if "train" in self.stages else None

    @property
    def base_seconds(self) -> float | None:
        """Return the seconds of round 0, which only evaluates; None if unknown."""
        return self.stages.get("evaluate")


def estimate(config: CampaignConfig, work: Work, facts: ModelFacts, gpu_bytes: int | None = None) -> Timing:
    """Return how long a round will take, without the time that people need."""
    own = _own_rounds(config, work)
    rate = None if "train" in own.stages else measured_rate(config, facts, gpu_bytes)
    if rate is None:
        return own
    return Timing(rate.seconds(config, work), rate.source, rate.compile_seconds)


def _own_rounds(config: CampaignConfig, work: Work) -> Timing:
    """Take the median over the campaign's last rounds that ran with the same ``model`` section."""
    newest_first = reversed(finished_numbers(config.folder))
    alike = (number for number in newest_first if round_config(config.folder, number).model == config.model)
    numbers = sorted(itertools.islice(alike, LAST_ROUNDS))
    seconds: dict[str, list[float]] = {}
    for number in numbers:
        past = finished_round(config.folder, number).stage_seconds
        ratios = _ratios(round_config(config.folder, number), config, work)
        for stage in ratios if number else ("evaluate", "publish"):
            seconds.setdefault(stage, []).append(past[stage] * ratios[stage])
    if not seconds:
        return Timing()
    medians = {stage: statistics.median(seconds[stage]) for stage in work.stages if stage in seconds}
    return Timing(medians, f"the campaign's own rounds ({', '.join(map(str, numbers))})")


def _ratios(past: CampaignConfig, config: CampaignConfig, work: Work) -> dict[str, float]:
    """How much more work each stage has than in a past round; the held-out images never change."""
    before = round_work(past, 0)
    images, pairs, trained = (
        now / then if then else 1.0
        for now, then in (
            (work.images, before.images), (work.pairs_judged, before.pairs_judged),
            (work.trained_images, before.trained_images),
        )
    )  # fmt: skip
    passes = trained * config.train.epochs / past.train.epochs
    return {"sample": images, "judge": images, "derive": pairs, "train": passes, "evaluate": 1.0, "publish": 1.0}
