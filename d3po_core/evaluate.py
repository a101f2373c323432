"""Held-out evaluation: the same prompts and seeds for every checkpoint, and intervals for what comes out."""

import numpy as np
from scipy.stats import bootstrap

from d3po_core.records import ScoreSummary
from d3po_core.rollout import ImageSeed
from d3po_core.seeds import derive_seed

CONFIDENCE = 0.95
RESAMPLES = 2000


def evaluation_seeds(prompts: list[str], images_per_prompt: int, campaign_seed: int) -> list[ImageSeed]:
    """What the held-out images are made from; the same in every round, and never shared with training."""
    return [
        ImageSeed(prompt, *(derive_seed(campaign_seed, "evaluate", prompt, k, what) for what in ("x_T", "noise")))
        for prompt in prompts
        for k in range(images_per_prompt)
    ]


def summarize(scores: np.ndarray) -> ScoreSummary:
    """Mean of the scores with its 95 % percentile bootstrap interval (scipy, fixed seed)."""
    mean = float(np.mean(scores))
    if len(scores) < 2 or np.ptp(scores) == 0:
        return ScoreSummary(mean=mean, low=mean, high=mean)
    interval = bootstrap(
        (scores,), np.mean, confidence_level=CONFIDENCE, n_resamples=RESAMPLES, method="percentile", rng=0
    ).confidence_interval
    return ScoreSummary(mean=mean, low=float(interval.low), high=float(interval.high))
