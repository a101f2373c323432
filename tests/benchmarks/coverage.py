"""How often intervals of held-out means hold, in 1,000 simulated campaigns per case; the bootstrap of before beside.

python tests/benchmarks/coverage.py
"""

import math

import numpy as np
from scipy.stats import bootstrap, norm, t

from d3po_core.intervals import mean_intervals

COUNT = 1000


def main() -> None:
    """Print a line per case: coverage and how often an interval is told."""
    rng = np.random.default_rng(0)

    def changed(prompts: int, images: int, up: float, down: float) -> np.ndarray:
        return rng.choice([1.0, 0, -1], p=[up, 1 - up - down, down], size=(COUNT, prompts, images)).mean(axis=2)

    cases = {
        "18 prompts x 8 images that differ": (rng.binomial(8, rng.beta(1.6, 0.4, (COUNT, 18))) / 8, 0.8, True),
        "18 normal": (rng.normal(size=(COUNT, 18)), 0.0, False),
        "6 normal": (rng.normal(size=(COUNT, 6)), 0.0, False),
        "6 prompts, few changed images": (changed(6, 8, 0.03, 0.01), 0.02, False),
        "18 prompts, few changed images": (changed(18, 8, 0.03, 0.01), 0.02, False),
        "8 prompts, one image each": ((rng.random((COUNT, 8)) < 0.8).astype(float), 0.8, True),
        "8 lognormal": (rng.lognormal(size=(COUNT, 8)), math.exp(0.5), False),
        "18 lognormal": (rng.lognormal(size=(COUNT, 18)), math.exp(0.5), False),
        "32 lognormal": (rng.lognormal(size=(COUNT, 32)), math.exp(0.5), False),
    }
    for name, (units, mean, shares) in cases.items():
        found = mean_intervals(units, shares)
        told = [f for f in found if None not in f.ends]
        now = f"{np.mean([f.low <= mean <= f.high for f in told]):.3f}" if told else "none"
        print(f"{name:36} before {before(units, mean):.3f}   now {now}, told in {len(told) / COUNT:.3f}")


def before(units: np.ndarray, mean: float) -> float:
    """Coverage of the expanded percentile bootstrap."""
    count = units.shape[1]
    tail = norm.cdf(-np.sqrt(count / (count - 1)) * t.ppf(0.975, count - 1))
    held = 0
    for row_U in units:
        found = bootstrap((row_U,), np.mean, n_resamples=2000, confidence_level=1 - 2 * tail, method="percentile",
                          rng=0).confidence_interval  # fmt: skip
        held += found.low <= mean <= found.high
    return held / len(units)


if __name__ == "__main__":
    main()
