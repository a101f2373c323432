"""Speed of sampling and training beside the published loop's cost, in one process, turn by turn.

    python tests/benchmarks/speed.py

Both sides compute on the same model, the same stored trajectories and the same pairs; before anything is timed, their
gradients are compared. A pair-step is one preference pair at one denoising step, trained once.
"""

import argparse
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, machine, show, spread, write_json
from published_loop import (
    BETA,
    CLIP_RANGE,
    PROMPTS_PER_BATCH,
    Published,
    encode,
    load_published,
    sample_groups,
    train_group,
    train_pair,
)
from rich.console import Console
from rich.table import Table

from d3po_core.config import CampaignConfig, TrainConfig
from d3po_core.models.loaded import load_policy
from d3po_core.models.policy import Policy
from d3po_core.sampling.prompts import load_prompts
from d3po_core.sampling.rollout import sample_trajectories
from d3po_core.seeds import ImageSeed, derive_seed, permutation
from d3po_core.training.lesson import TrainingSet
from d3po_core.training.optimizer import make_optimizer
from d3po_core.training.packing import PairedGroup
from d3po_core.training.trainer import train_updates

CONFIG = CampaignConfig()
GUIDANCE = 1.0
SEED = 0

Rate = Callable[[], float]


def main() -> None:
    """Measure, print, write."""
    arguments = _arguments()
    before = machine() | {"torch_threads": torch.get_num_threads()}
    policy = load_policy(CONFIG.model, SEED)
    if policy.device.type != "cpu":
        raise SystemExit("this comparison is for the CPU; hide the GPU: CUDA_VISIBLE_DEVICES= python ...")
    published = load_published(CONFIG.model, CONFIG.sample.num_steps, CONFIG.sample.eta, SEED)
    small, large = training_set(policy, arguments.groups_of_2, 2), training_set(policy, arguments.groups_of_7, 7)
    difference = gradient_difference(policy, published, small)
    print(f"same gradient on one pair: relative difference {difference:.1e}")
    assert difference < 1e-3, "the two sides do not compute the same thing: their speeds cannot be compared"
    sides: dict[str, tuple[Rate, Rate]] = {
        "sampling": (
            lambda: rate_sampling(policy, arguments.images),
            lambda: rate_sampling_published(published, arguments.images, arguments.sampling_group),
        ),
        "training, group 2": (
            lambda: rate_training(policy, small),
            lambda: rate_training_published(published, small, arguments.published_pairs),
        ),
        "training, group 7": (
            lambda: rate_training(policy, large),
            lambda: rate_training_published(published, large, arguments.published_pairs),
        ),
    }
    rates = measure(sides, arguments.repeats)
    report(arguments, rates, before)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="turns of every measurement (5)")
    parser.add_argument("--images", type=int, default=320, help="images a turn of sampling (320)")
    parser.add_argument("--sampling-group", type=int, default=2, help="group size of published sampling (2)")
    parser.add_argument("--groups-of-2", type=int, default=32, help="our groups a turn, one pair each (32)")
    parser.add_argument("--groups-of-7", type=int, default=8, help="our groups a turn, 21 pairs each (8)")
    parser.add_argument("--published-pairs", type=int, default=4, help="pairs a turn of published training (4)")
    parser.add_argument("--output", type=Path, default=RESULTS / "speed.json", help="JSON file")
    return parser.parse_args()


def measure(sides: dict[str, tuple[Rate, Rate]], repeats: int) -> dict[str, tuple[list[float], list[float]]]:
    """Rates of ours and of the published loop, taken in turns after one turn that does not count."""
    rates: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in sides}
    with Console(stderr=True).status("measuring") as status:
        for repeat in range(-1, repeats):
            for name, pair in sides.items():
                for side, rate in enumerate(pair):
                    status.update(f"{'warm-up' if repeat < 0 else f'turn {repeat + 1}'}: {name}")
                    value = rate()
                    if repeat >= 0:
                        rates[name][side].append(value)
    return rates


def rate_sampling(policy: Policy, images: int) -> float:
    """Images a second: trajectories with log_probs, decoded, in batches of the configured size."""
    seeds = image_seeds(-(-images // CONFIG.sample.group_size), CONFIG.sample.group_size)[:images]
    schedule = policy.schedule(CONFIG.sample.num_steps, CONFIG.sample.eta)
    started = time.perf_counter()
    for start in range(0, images, CONFIG.sample.batch_size):
        batch = seeds[start : start + CONFIG.sample.batch_size]
        policy.decode(sample_trajectories(policy, schedule, batch, GUIDANCE, torch.float32).latents_BTCHW[:, -1])
    return images / (time.perf_counter() - started)


def rate_sampling_published(published: Published, images: int, group_size: int) -> float:
    """Images a second: passes of 10 images, whole batches only."""
    batches = max(1, round(images / (PROMPTS_PER_BATCH * group_size)))
    prompts = (all_prompts() * batches)[: batches * PROMPTS_PER_BATCH]
    started = time.perf_counter()
    sample_groups(published, prompts, group_size)
    return len(prompts) * group_size / (time.perf_counter() - started)


def rate_training(policy: Policy, data: TrainingSet) -> float:
    """Pair-steps a second of a round's updates, with the configured micro-batch and the stored reference."""
    policy.reset()
    schedule = policy.schedule(CONFIG.sample.num_steps, CONFIG.sample.eta)
    optimizer = make_optimizer(policy, CONFIG.train)
    started = time.perf_counter()
    for _ in train_updates(policy, optimizer, schedule, data, CONFIG.train, GUIDANCE, SEED):
        pass
    seconds = time.perf_counter() - started
    return sum(len(group.pairs) for group in data.groups) * int(schedule.trainable_T.sum()) / seconds


def rate_training_published(published: Published, data: TrainingSet, pairs: int) -> float:
    """Pair-steps a second of the first pairs; the others would cost the same each."""
    optimizer = published.optimizer()
    done = 0
    seconds = 0.0
    for group in data.groups:
        text_1LD = encode(published, [data.prompts[group.images[0]]])
        members_MTCHW = data.latents_NTCHW[list(group.images)]
        wins = [float(sum(winner == image for winner, _, _ in group.pairs)) for image in group.images]
        started = time.perf_counter()
        done += train_group(published, optimizer, text_1LD, members_MTCHW, wins, max_pairs=pairs - done)
        seconds += time.perf_counter() - started
        if done >= pairs:
            break
    return done * len(published.schedule.timesteps_T) / seconds


def training_set(policy: Policy, num_groups: int, group_size: int) -> TrainingSet:
    """Sampled groups whose members all have different random scores, so that every pair has a winner."""
    seeds = image_seeds(num_groups, group_size)
    schedule = policy.schedule(CONFIG.sample.num_steps, CONFIG.sample.eta)
    drawn = sample_trajectories(policy, schedule, seeds, GUIDANCE, torch.float32)
    groups = []
    for index in range(num_groups):
        images = range(index * group_size, (index + 1) * group_size)
        score = dict(zip(images, permutation(derive_seed(SEED, "score", index), group_size), strict=True))
        ordered = [(a, b) if score[a] > score[b] else (b, a) for a, b in itertools.combinations(images, 2)]
        groups.append(PairedGroup(tuple(images), tuple((winner, loser, 1.0) for winner, loser in ordered)))
    return TrainingSet(
        [seed.prompt for seed in seeds],
        drawn.latents_BTCHW,
        drawn.log_probs_BT,
        groups,
        [seed.noise_seed for seed in seeds],
    )


def gradient_difference(policy: Policy, published: Published, data: TrainingSet) -> float:
    """Relative difference of the LoRA's gradient, ours and the published loop's, on the first pair of the set."""
    settings: dict[str, Any] = {"beta": BETA, "clip": "two_sided", "clip_range": CLIP_RANGE, "updates_per_round": 1}
    config = TrainConfig(timestep_weighting="none", max_grad_norm=1e9, **settings)
    group = data.groups[0]
    one_pair = TrainingSet(data.prompts, data.latents_NTCHW, data.log_probs_NT, [group], data.noise_seeds)
    schedule = policy.schedule(CONFIG.sample.num_steps, CONFIG.sample.eta)
    ours = [parameter for _, parameter in policy.weights.parameters()]
    still = torch.optim.SGD(ours, lr=0.0)
    for _ in train_updates(policy, still, schedule, one_pair, config, GUIDANCE, SEED):
        pass
    winner, loser, _ = group.pairs[0]
    text_1LD = encode(published, [data.prompts[winner]])
    latents = data.latents_NTCHW
    theirs = published.parameters()
    train_pair(published, torch.optim.SGD(theirs, lr=0.0), text_1LD, latents[winner], latents[loser], 1e9)
    a, b = (torch.cat([p.grad.flatten() for p in side if p.grad is not None]) for side in (ours, theirs))
    assert a.shape == b.shape, "the two sides train different weights"
    assert a.norm() > 0, "there is no gradient to compare"
    return float((a - b).norm() / a.norm())


def image_seeds(num_groups: int, group_size: int) -> list[ImageSeed]:
    """Seeds of groups that share an x_T."""
    prompts = all_prompts()
    return [
        ImageSeed(prompts[g % len(prompts)], derive_seed(SEED, g, "x_T"), derive_seed(SEED, g, "noise", m))
        for g in range(num_groups)
        for m in range(group_size)
    ]


def all_prompts() -> list[str]:
    """The prompts that rounds sample from."""
    return load_prompts(CONFIG.sample.prompts, CONFIG.sample.prompt_column, "sample.prompts")


def report(
    arguments: argparse.Namespace, rates: dict[str, tuple[list[float], list[float]]], before: dict[str, Any]
) -> None:
    """Print the table and write the JSON file."""
    steps = CONFIG.sample.num_steps
    rows: list[tuple[str, list[float], list[float]]] = [("sampling, images/s", *rates["sampling"])]
    ours, theirs = rates["sampling"]
    rows.append(("sampling, image-steps/s", [r * steps for r in ours], [r * steps for r in theirs]))
    rows += [(f"{name}, pair-steps/s", *rates[name]) for name in rates if name != "sampling"]
    table = Table(title=rf"median \[min, max] of {arguments.repeats} turns", title_justify="left")
    for column in ("what", "ours", "published loop", "ratio, turn by turn"):
        table.add_column(column, justify="left" if column == "what" else "right", no_wrap=True)
    results = {}
    for name, mine, other in rows:
        ratios = [a / b for a, b in zip(mine, other, strict=True)]
        results[name] = {"ours": spread(mine), "published": spread(other), "ratio": spread(ratios)}
        values = (show(results[name]["ours"]), show(results[name]["published"]), show(results[name]["ratio"]))
        table.add_row(name, *values)
    Console(width=120).print(table)
    pairs_of_7 = arguments.groups_of_7 * 21
    seconds = {side: 21 * steps / results["training, group 7, pair-steps/s"][side]["median"]
               for side in ("ours", "published")}  # fmt: skip
    notes = [
        f"T = {steps}, guidance 1, float32, eager, {before['torch_threads']} torch threads on {before['cpu']}",
        f"ours: sampling in batches of {CONFIG.sample.batch_size}, training in micro-batches of "
        f"{CONFIG.train.micro_batch} image-steps, whole updates with every pair: "
        f"{arguments.groups_of_2} pairs (group 2), {pairs_of_7} pairs (group 7), each at {steps} steps",
        f"published: sampling in passes of {PROMPTS_PER_BATCH}; of training only {arguments.published_pairs} pairs a "
        f"turn are timed, each at {steps} steps, since every pair costs the same there",
        f"so one prompt of 7 images (21 pairs x {steps} steps) takes {seconds['ours']:.2f} s in ours (measured in "
        f"{pairs_of_7} pairs) and {seconds['published']:.1f} s in the published loop (scaled from "
        f"{arguments.published_pairs} pairs)",
    ]
    print("\n".join(notes))
    write_json(arguments.output, vars(arguments), before, {"rates": results, "notes": notes})


if __name__ == "__main__":
    main()
