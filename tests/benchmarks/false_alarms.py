"""How often guard and report are wrong over a campaign, and what they catch; before (95 % intervals) and now.

Campaigns of 100 rounds in which nothing changes: 18 held-out prompts of 8 images, each image right with its prompt's
chance (0.8 on average), rounds as alike as ``--correlation`` says. Then, after 20 such rounds, one that fell.

    python tests/benchmarks/false_alarms.py
"""

import argparse

import numpy as np
from scipy.stats import norm, t

from d3po_core.evaluation.comparison import BETTER, champions, compare_scores, fitted_champion
from d3po_core.evaluation.guard import ALARM
from d3po_core.intervals import unit_means


def main() -> None:
    """Print a table of errors over campaigns, and one of falls that were caught."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--campaigns", type=int, default=100)
    parser.add_argument("--falls", type=int, default=200)
    parser.add_argument("--prompts", type=int, default=18)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--latent", type=float, default=0.9877, help="0.9877 gives 0.9 between rounds; 0 none")
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    world = World(rng, arguments.prompts, arguments.images, arguments.latent)
    report(world, arguments.campaigns)
    for share in (0.71, 0.60, 0.50):
        caught(world, arguments.falls, share)


class World:
    """Equally good checkpoints: each image is right by a chance that wanders from round to round."""

    def __init__(self, rng: np.random.Generator, prompts: int, images: int, latent: float) -> None:
        self.rng, self.shape, self.latent = rng, (prompts, images), latent
        self.prompts = [f"p{n:03}" for n in range(prompts) for _ in range(images)]

    def campaign(self, rounds: int, last: float | None = None) -> np.ndarray:
        """Scores ``[rounds + 1, I]``; with ``last`` one more round, whose share right is that."""
        chance_U1 = self.rng.beta(2.4, 0.6, (self.shape[0], 1))
        luck, rows = self.rng.normal(size=self.shape), []
        for _ in range(rounds + 1):
            rows.append(luck < norm.ppf(chance_U1))
            luck = self.latent * luck + np.sqrt(1 - self.latent**2) * self.rng.normal(size=self.shape)
        if last is not None:
            rows.append(luck < norm.ppf(chance_U1 * last / 0.8))
        return np.array(rows, dtype=float).reshape(len(rows), -1)


def fall_before(scores_I: np.ndarray, champion_I: np.ndarray, prompts: list[str], tolerance: float = 0.0) -> bool:
    """As it was judged: the 95 % interval of the difference to the best of all looks lies below the tolerance."""
    units_U = unit_means(scores_I - champion_I, prompts)
    error = units_U.std(ddof=1) / np.sqrt(len(units_U))
    return bool(units_U.mean() + t.ppf(0.975, len(units_U) - 1) * error < -tolerance)


def fall_now(scores_RI: np.ndarray, prompts: list[str]) -> bool:
    """As the guard judges the last row: against the one before, and against the champion of the other prompts."""
    before_RI = scores_RI[:-1]
    fitted_I = before_RI[fitted_champion(before_RI, prompts), np.arange(scores_RI.shape[1])]
    references = (before_RI[-1], fitted_I)
    return any(compare_scores(scores_RI[-1], other, prompts).chance_of_as_low() < ALARM for other in references)


def report(world: World, count: int) -> None:
    """Errors over campaigns in which nothing changes."""
    looks = (1, 10, 100)
    better = {how: dict.fromkeys(looks, 0) for how in ("before", "now")}
    bias = {how: dict.fromkeys(looks, 0.0) for how in ("before", "now")}
    flagged, single, ever_better = {"before": 0, "now": 0}, 0, 0
    for _ in range(count):
        scores_RI = world.campaign(100)
        reigns, images_I = champions(scores_RI, world.prompts), np.arange(scores_RI.shape[1])
        alarms = {"before": False, "now": False}
        called = False
        for number in range(1, 101):
            seen_RI = scores_RI[: number + 1]
            old = fall_before(seen_RI[-1], scores_RI[reigns[number - 1]], world.prompts)
            alarms["before"] |= old
            single += old and number > 30
            alarms["now"] |= fall_now(seen_RI, world.prompts)
            fitted_I = seen_RI[fitted_champion(seen_RI, world.prompts), images_I]
            yes = compare_scores(fitted_I, seen_RI[0], world.prompts).verdict == BETTER
            called |= yes
            if number in looks:
                best_I = scores_RI[reigns[number]]
                better["before"][number] += fall_before(seen_RI[0], best_I, world.prompts)
                better["now"][number] += yes
                bias["before"][number] += best_I.mean() - scores_RI.mean()
                bias["now"][number] += fitted_I.mean() - scores_RI.mean()
        ever_better += called
        for how, alarm in alarms.items():
            flagged[how] += alarm
    print(f"{count} campaigns of 100 rounds, {world.shape[0]} prompts x {world.shape[1]} images")
    print(f"a round from 31 on is flagged, before: {single / count / 70:.3f}")
    for how in ("before", "now"):
        print(f"{how:>7}: a campaign is ever flagged {flagged[how] / count:.3f}; report says better after 1, 10, 100 "
              f"rounds {' '.join(f'{n / count:.3f}' for n in better[how].values())}; champion's score too high by "
              f"{' '.join(f'{value / count:+.3f}' for value in bias[how].values())}")  # fmt: skip
    print(f"    now: report ever says better in 100 rounds {ever_better / count:.3f}")


def caught(world: World, count: int, share: float) -> None:
    """How often a round that fell from 0.80 is flagged."""
    hits = {"before": 0, "tolerance 0.05": 0, "now": 0}
    for _ in range(count):
        scores_RI = world.campaign(20, last=share)
        best_I = scores_RI[champions(scores_RI[:-1], world.prompts)[-1]]
        hits["before"] += fall_before(scores_RI[-1], best_I, world.prompts)
        hits["tolerance 0.05"] += fall_before(scores_RI[-1], best_I, world.prompts, 0.05)
        hits["now"] += fall_now(scores_RI, world.prompts)
    told = ", ".join(f"{how} {hit / count:.3f}" for how, hit in hits.items())
    print(f"a fall from 0.80 to {share:.2f} is flagged: {told}")


if __name__ == "__main__":
    main()
