"""Whom to believe: raters of known accuracy, one of whom lies, decided by each method, and trained on.

    python tests/benchmarks/raters.py --device cpu

First, how many pairs each method decides right, and how long it takes. Then whole campaigns on the embedded model: the
raters mark the images of every group right or wrong (the truth is prompt_alignment) with their accuracy, the marks are
decided, the policy is trained on the pairs and their weights, and held-out images are compared. Needs d3po_core and
crowd-kit, and neither Prefect nor MLflow nor DuckDB. The result is written after every campaign.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from common import RESULTS, machine, write_json
from rich.console import Console
from rich.table import Table
from scipy import stats
from simulated_raters import MODES, draw_groups, quality, simulate_votes, true_answers

from d3po_core.config import CampaignConfig, ModelConfig
from d3po_core.models.loaded import load_policy
from d3po_core.models.policy import Policy
from d3po_core.preferences.deciding import decide
from d3po_core.sampling.prompts import draw_prompts, load_prompts
from d3po_core.sampling.rollout import Trajectories, sample_trajectories
from d3po_core.scorers.finding import prompt_alignment
from d3po_core.seeds import ImageSeed, derive_seed, evaluation_seeds
from d3po_core.training.lesson import TrainingSet
from d3po_core.training.optimizer import make_optimizer
from d3po_core.training.packing import PairedGroup
from d3po_core.training.trainer import train_updates

CONFIG = CampaignConfig()
GROUP_SIZE = 4
METHODS = ("majority", "bradley_terry", "dawid_skene")
# Who decides: the truth, one rater of middling accuracy, or all raters by one of the methods.
JUDGES = ("truth", "dawid_skene", "majority", "bradley_terry", "one_rater")

Row = dict[str, Any]


def main() -> None:
    """Decide, train, print, write."""
    arguments = _arguments()
    before = machine() | {"torch_threads": torch.get_num_threads(), "device": arguments.device}
    path = arguments.out / "raters.json"
    results: dict[str, Any] = {"aggregation": aggregation(arguments), "speed": speed(arguments), "training": []}
    show_aggregation(results)
    if arguments.rounds:
        policy = load_policy(ModelConfig(device=arguments.device), seed=0)
        for seed in arguments.seeds:
            for judge in arguments.judges:
                results["training"] += campaign(policy, arguments, judge, seed)
                results["summary"] = summary(results["training"])
                write_json(path, vars(arguments), before, results)
        show_training(results["summary"], arguments)
    write_json(path, vars(arguments), before, results)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the model runs (cpu)")
    parser.add_argument("--rounds", type=int, default=16, help="rounds a campaign; 0 only decides (16)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="campaign seeds (0 1 2)")
    parser.add_argument("--groups", type=int, default=32, help="groups of 4 images a round (32)")
    parser.add_argument("--judges", nargs="+", choices=JUDGES, default=list(JUDGES), help="who decides (all)")
    parser.add_argument("--raters", type=float, nargs="+", default=[0.9, 0.75, 0.65, 0.55, 0.2],
                        help="accuracy of each rater; below 0.5 lies (0.9 0.75 0.65 0.55 0.2)")  # fmt: skip
    parser.add_argument("--mediocre", type=float, default=0.65, help="accuracy of the judge one_rater (0.65)")
    parser.add_argument("--mode", choices=MODES, default="mark_bad", help="how the raters judge (mark_bad)")
    parser.add_argument("--evaluate-every", type=int, default=4, help="rounds between evaluations (4)")
    parser.add_argument("--images-per-prompt", type=int, default=8, help="evaluation images a held-out prompt (8)")
    parser.add_argument("--batch", type=int, default=64, help="images sampled at once (64)")
    parser.add_argument("--aggregation-seeds", type=int, default=10, help="simulations a line of the first table (10)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON")
    return parser.parse_args()


def aggregation(arguments: argparse.Namespace) -> list[Row]:
    """Quality of each method's decisions, for every way of judging, with all raters or three a group."""
    rows = []
    for mode in MODES:
        for raters_per_group in (len(arguments.raters), min(3, len(arguments.raters))):
            for seed in range(arguments.aggregation_seeds):
                good_GM = draw_groups(arguments.groups, GROUP_SIZE, 0.5, seed)
                votes = simulate_votes(good_GM, arguments.raters, seed + 1000, mode, raters_per_group)
                for method in METHODS:
                    found = quality(decide(votes, method, 0.0), true_answers(good_GM))
                    rows.append({"mode": mode, "raters": raters_per_group, "method": method, "seed": seed, **found})
    return rows


def speed(arguments: argparse.Namespace) -> list[Row]:
    """Seconds to decide a round of 1,000 groups; the best of three."""
    votes = simulate_votes(draw_groups(1000, GROUP_SIZE, 0.5, 0), arguments.raters, 1)
    rows = []
    for method in METHODS:
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            decide(votes, method, 0.0)
            seconds.append(time.perf_counter() - started)
        rows.append({"method": method, "votes": len(votes), "seconds": min(seconds)})
    return rows


def campaign(policy: Policy, arguments: argparse.Namespace, judge: str, seed: int) -> list[Row]:
    """Rounds of sampling, judging, deciding and training; a row an evaluation."""
    policy.reset()
    optimizer = make_optimizer(policy, CONFIG.train)
    schedule = policy.schedule(CONFIG.sample.num_steps, CONFIG.sample.eta)
    started, rows = time.perf_counter(), []
    for number in range(arguments.rounds + 1):
        right = None
        if number:
            data, right = judged_round(policy, arguments, judge, seed, number)
            train_seed = derive_seed(seed, number, "train")
            for _ in train_updates(
                policy, optimizer, schedule, data, CONFIG.train, CONFIG.sample.guidance_scale, train_seed
            ):
                pass
        if number % arguments.evaluate_every == 0 or number == arguments.rounds:
            rows.append({"judge": judge, "seed": seed, "round": number, "held_out": held_out(policy, arguments, seed),
                         "pairs_right": right})  # fmt: skip
    print(f"seed {seed} {judge}: held-out {rows[0]['held_out']:.3f} -> {rows[-1]['held_out']:.3f} "
          f"in {time.perf_counter() - started:.0f} s", flush=True)  # fmt: skip
    return rows


def judged_round(
    policy: Policy, arguments: argparse.Namespace, judge: str, seed: int, number: int
) -> tuple[TrainingSet, float | None]:
    """Sample a round's groups and let the judge decide their pairs: what to train on, and the share decided right."""
    prompts = load_prompts(CONFIG.sample.prompts, CONFIG.sample.prompt_column, "sample.prompts")
    seeds = [
        ImageSeed(prompt, derive_seed(*key, "x_T"), derive_seed(*key, "noise", member))
        for prompt, occurrence in draw_prompts(prompts, arguments.groups, seed, number)
        for key in [(seed, number, prompt, occurrence)]
        for member in range(GROUP_SIZE)
    ]
    drawn, right_N = sample_and_score(policy, seeds, arguments.batch)
    good_GM = right_N.reshape(-1, GROUP_SIZE).astype(int)
    votes_seed = derive_seed(seed, number, "raters")
    judges: dict[str, tuple[list[float], str]] = {
        "truth": ([1.0], "majority"),
        "one_rater": ([arguments.mediocre], "majority"),
    }
    accuracies, method = judges.get(judge, (arguments.raters, judge))
    decided = decide(simulate_votes(good_GM, accuracies, votes_seed, arguments.mode), method, 0.0)
    truth = true_answers(good_GM)
    share = quality(decided, truth)["right"] if any(truth.values()) else None
    return training_set(seeds, drawn, decided, GROUP_SIZE), share


def sample_and_score(policy: Policy, seeds: list[ImageSeed], batch: int) -> tuple[Trajectories, np.ndarray]:
    """Trajectories of all images, and which of them show their prompt."""
    schedule = policy.schedule(CONFIG.sample.num_steps, CONFIG.sample.eta)
    latents, log_probs, right = [], [], []
    for start in range(0, len(seeds), batch):
        part = seeds[start : start + batch]
        drawn = sample_trajectories(policy, schedule, part, CONFIG.sample.guidance_scale, torch.float32)
        images = policy.decode(drawn.latents_BTCHW[:, -1])
        right.append(prompt_alignment(images, [image.prompt for image in part]))
        latents.append(drawn.latents_BTCHW)
        log_probs.append(drawn.log_probs_BT)
    return Trajectories(torch.cat(latents), torch.cat(log_probs)), np.concatenate(right)


def training_set(seeds: list[ImageSeed], drawn: Trajectories, decided: pa.Table, size: int) -> TrainingSet:
    """Images of a pair that somebody won, with the pairs' weights; the others are left out."""
    pairs_of: dict[int, list[tuple[int, int, float]]] = {}
    for row in decided.to_pylist():
        if row["outcome"]:
            group = int(row["group_id"][1:])
            ends = [group * size + row["first_member"], group * size + row["second_member"]]
            winner, loser = ends if row["outcome"] > 0 else reversed(ends)
            pairs_of.setdefault(group, []).append((winner, loser, row["weight"]))
    groups = []
    for pairs in pairs_of.values():
        images = tuple(sorted({image for winner, loser, _ in pairs for image in (winner, loser)}))
        groups.append(PairedGroup(images, tuple(pairs)))
    return TrainingSet(
        [seed.prompt for seed in seeds],
        drawn.latents_BTCHW,
        drawn.log_probs_BT,
        groups,
        [seed.noise_seed for seed in seeds],
    )


def held_out(policy: Policy, arguments: argparse.Namespace, seed: int) -> float:
    """Share of the held-out images that show their prompt; the same prompts and noise for every judge of a seed."""
    prompts = load_prompts(CONFIG.evaluate.prompts, CONFIG.evaluate.prompt_column, "evaluate.prompts")
    seeds = evaluation_seeds(prompts, arguments.images_per_prompt, seed)
    return float(sample_and_score(policy, seeds, arguments.batch)[1].mean())


def summary(rows: list[Row]) -> list[Row]:
    """Held-out means over seeds at the last round, with 95 % t intervals; differences to one_rater are a seed's."""
    last = max(row["round"] for row in rows)
    final = {(row["judge"], row["seed"]): row["held_out"] for row in rows if row["round"] == last}
    start = {row["seed"]: row["held_out"] for row in rows if row["round"] == 0}
    found = []
    for judge in dict.fromkeys(judge for judge, _ in final):
        seeds = [seed for name, seed in final if name == judge]
        gains = [final[judge, seed] - final["one_rater", seed] for seed in seeds if ("one_rater", seed) in final]
        right = [row["pairs_right"] for row in rows if row["judge"] == judge and row["pairs_right"] is not None]
        found.append({
            "judge": judge, "rounds": last, "seeds": len(seeds), "start": float(np.mean([start[s] for s in seeds])),
            "pairs_right": float(np.mean(right)) if right else None,
            "held_out": interval([final[judge, seed] for seed in seeds]), "over_one_rater": interval(gains),
        })  # fmt: skip
    return found


def interval(values: list[float]) -> list[float] | None:
    """Mean and 95 % t interval; of a single value, only itself."""
    if not values:
        return None
    mean, error = float(np.mean(values)), float(stats.sem(values)) if len(values) > 1 else 0.0
    half = error * float(stats.t.ppf(0.975, len(values) - 1)) if error else 0.0
    return [mean, mean - half, mean + half]


def show_aggregation(results: dict[str, Any]) -> None:
    """Print quality and speed of each method."""
    table = Table(title="pairs decided right (share of weight that is right minus wrong), mean over simulations",
                  title_justify="left")  # fmt: skip
    rows: list[Row] = results["aggregation"]
    for column in ("judging", "raters a group", *METHODS):
        table.add_column(column)
    for mode, raters in dict.fromkeys((row["mode"], row["raters"]) for row in rows):
        cells = []
        for method in METHODS:
            chosen = [row for row in rows if (row["mode"], row["raters"], row["method"]) == (mode, raters, method)]
            right, signal = (np.mean([row[key] for row in chosen]) for key in ("right", "signal"))
            cells.append(f"{right:.3f} ({signal:.3f})")
        table.add_row(mode, str(raters), *cells)
    seconds = (f"{row['seconds']:.2f} s" for row in results["speed"])
    table.add_row(f"{results['speed'][0]['votes']:,} votes", "", *seconds)
    Console(width=120).print(table)


def show_training(rows: list[Row], arguments: argparse.Namespace) -> None:
    """Print what training on each judge came to."""
    title = f"held-out alignment after {arguments.rounds} rounds of {arguments.groups} groups, {arguments.mode}"
    table = Table(title=f"{title}: mean over seeds [95 %]", title_justify="left")
    for column in ("judge", "seeds", "pairs right", "start", "held-out", "over one rater"):
        table.add_column(column)
    for row in rows:
        texts = ("-" if cell is None else f"{cell[0]:.3f} [{cell[1]:.3f}, {cell[2]:.3f}]"
                 for cell in (row["held_out"], row["over_one_rater"]))  # fmt: skip
        right = "-" if row["pairs_right"] is None else f"{row['pairs_right']:.3f}"
        table.add_row(row["judge"], str(row["seeds"]), right, f"{row['start']:.3f}", *texts)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
