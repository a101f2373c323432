"""How many judgements the order of questions saves: asked by expected information against asked at random.

Campaigns on the embedded model in which a simulated person marks the bad images of some of each round's groups, with
mistakes. Sampling is cheap and people are not: every round samples more groups than are judged. The orders differ in
which groups those are, and in nothing else: prompts, seeds and mistakes are the same. They start from the same
checkpoint, after some rounds that the proxy judged: while nearly every group holds good and bad images, as in the first
rounds, there is nothing to choose.
"""

import argparse
import itertools
import json
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

from d3po_core.config import ModelConfig, TrainConfig
from d3po_core.models.checkpoint import load_checkpoint, save_checkpoint
from d3po_core.models.loaded import load_policy
from d3po_core.models.policy import Policy
from d3po_core.people.information import FADE, expected_information
from d3po_core.sampling.prompts import draw_prompts, load_prompts
from d3po_core.sampling.rollout import sample_trajectories
from d3po_core.scorers.finding import prompt_alignment
from d3po_core.seeds import ImageSeed, derive_seed, evaluation_seeds
from d3po_core.store.files import atomic_path
from d3po_core.store.images import dissimilarity
from d3po_core.training.lesson import TrainingSet
from d3po_core.training.optimizer import make_optimizer
from d3po_core.training.packing import PairedGroup
from d3po_core.training.trainer import train_updates

ROOT = Path(__file__).resolve().parent.parent.parent
STEPS, GUIDANCE, BATCH, WARM_GROUPS = 10, 1.0, 64, 32
ORDERS = ("information", "random")
LEVELS = (0.72, 0.74, 0.76, 0.78, 0.80, 0.82, 0.84, 0.86, 0.88, 0.90)

Curve = list[tuple[int, float]]


def main() -> None:
    """Run the campaigns that are not there yet, print what is saved, draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--warm-rounds", type=int, default=14, help="rounds of 32 groups judged by the proxy before")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--groups", type=int, default=64, help="groups sampled a round")
    parser.add_argument("--judged", type=int, default=16, help="groups judged a round")
    parser.add_argument("--size", type=int, default=4, help="images of a group")
    parser.add_argument("--mistakes", type=float, default=0.1, help="share of marks that are wrong")
    parser.add_argument("--evaluate-every", type=int, default=2)
    parser.add_argument("--images-per-prompt", type=int, default=16, help="held-out images of each of 18 prompts")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmark-results" / "judgements_saved")
    parser.add_argument("--figure", type=Path, default=ROOT / "docs" / "judgements_saved.png")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    curves: dict[str, list[Curve]] = defaultdict(list)
    for seed in arguments.seeds:
        for order in ORDERS:
            sizes = (arguments.warm_rounds, arguments.groups, arguments.judged, arguments.rounds)
            path = arguments.out / f"{order}-{seed}-{'-'.join(map(str, sizes))}.json"
            if not path.exists():
                curve = campaign(arguments, order, seed)
                with atomic_path(path) as temporary:
                    temporary.write_text(json.dumps(curve))
            curves[order].append([(int(judged), score) for judged, score in json.loads(path.read_text())])
    table(curves)
    draw(curves, arguments.figure)


def campaign(arguments: argparse.Namespace, order: str, seed: int) -> Curve:
    """Held-out share drawn right against judged groups."""
    policy = load_policy(ModelConfig(device=arguments.device), seed)
    config = TrainConfig()
    optimizer = make_optimizer(policy, config)
    prompts = load_prompts("data/prompts/shapes_train.txt", "prompt", "sample.prompts")
    held_out_prompts = load_prompts("data/prompts/shapes_eval.txt", "prompt", "evaluate.prompts")
    held_out = evaluation_seeds(held_out_prompts, arguments.images_per_prompt, seed)
    history: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(2))  # decided pairs and all pairs of a prompt
    judged, started = 0, time.perf_counter()
    warm_up(policy, optimizer, config, prompts, arguments, seed)
    curve = [(0, float(draw_images(policy, held_out)[2].mean()))]
    for number in range(1, arguments.rounds + 1):
        groups = round_groups(prompts, arguments.groups, arguments.size, seed, number)
        latents, log_probs, right, images = draw_images(policy, [image for group in groups for image in group])
        mistaken = np.random.default_rng(derive_seed(seed, number, "mistakes")).random(len(right)) < arguments.mistakes
        good_GM = (right.astype(bool) ^ mistaken).reshape(len(groups), -1)
        chosen = choose(
            order, groups, images.reshape(*good_GM.shape, *images.shape[1:]), history, arguments, seed, number
        )
        judged += len(chosen)
        data = training_set(groups, chosen, good_GM, latents, log_probs)
        list(train_updates(policy, optimizer, policy.schedule(STEPS, 1.0), data, config, GUIDANCE,
                           derive_seed(seed, number, "train")))  # fmt: skip
        for marks in history.values():
            marks *= FADE
        for g in chosen:
            good, size = int(good_GM[g].sum()), good_GM.shape[1]
            history[groups[g][0].prompt] += (good * (size - good), size * (size - 1) / 2)
        if number % arguments.evaluate_every == 0:
            curve.append((judged, float(draw_images(policy, held_out)[2].mean())))
            print(
                f"{order:11} seed {seed} round {number:2}: {judged:4} groups judged, held-out {curve[-1][1]:.3f}, "
                f"{len(data.groups)} of {len(chosen)} with a pair, {time.perf_counter() - started:.0f} s",
                flush=True,
            )
    return curve


def warm_up(
    policy: Policy, optimizer: torch.optim.Optimizer, config: TrainConfig, prompts: list[str],
    arguments: argparse.Namespace, seed: int,
) -> None:  # fmt: skip
    """Rounds whose groups are all judged, without mistakes; kept, since both orders start from them."""
    folder = arguments.out / f"warm-{seed}-{arguments.warm_rounds}"
    if not folder.exists():
        for number in range(-arguments.warm_rounds, 0):
            groups = round_groups(prompts, WARM_GROUPS, arguments.size, seed, number)
            latents, log_probs, right, _ = draw_images(policy, [image for group in groups for image in group])
            good_GM = right.astype(bool).reshape(len(groups), -1)
            data = training_set(groups, list(range(len(groups))), good_GM, latents, log_probs)
            list(train_updates(policy, optimizer, policy.schedule(STEPS, 1.0), data, config, GUIDANCE,
                               derive_seed(seed, number, "train")))  # fmt: skip
        save_checkpoint(folder, policy, optimizer, {})
    load_checkpoint(folder, policy, optimizer)


def round_groups(prompts: list[str], count: int, size: int, seed: int, number: int) -> list[list[ImageSeed]]:
    """The round's groups, each from one initial latent."""
    return [
        [
            ImageSeed(prompt, derive_seed(seed, number, prompt, again, "x_T"),
                      derive_seed(seed, number, prompt, again, "noise", member))
            for member in range(size)
        ]
        for prompt, again in draw_prompts(prompts, count, seed, number)
    ]  # fmt: skip


def draw_images(policy: Policy, seeds: list[ImageSeed]) -> tuple[torch.Tensor, torch.Tensor, np.ndarray, np.ndarray]:
    """Latents, log_probs, whether each image is right, and the images."""
    parts: list[Any] = []
    for start in range(0, len(seeds), BATCH):
        batch = seeds[start : start + BATCH]
        drawn = sample_trajectories(policy, policy.schedule(STEPS, 1.0), batch, GUIDANCE, torch.float32)
        images = policy.decode(drawn.latents_BTCHW[:, -1])
        right = prompt_alignment(images, [seed.prompt for seed in batch])
        parts.append((drawn.latents_BTCHW, drawn.log_probs_BT, right, images))
    latents, log_probs, right, images = zip(*parts, strict=True)
    return torch.cat(latents), torch.cat(log_probs), np.concatenate(right), np.concatenate(images)


def choose(
    order: str, groups: list[list[ImageSeed]], images_GMHWC: np.ndarray, history: dict[str, np.ndarray],
    arguments: argparse.Namespace, seed: int, number: int,
) -> list[int]:  # fmt: skip
    """Which groups are judged in this round."""
    if order == "random":
        generator = np.random.default_rng(derive_seed(seed, number, "order"))
        return [int(g) for g in generator.permutation(len(groups))[: arguments.judged]]
    different_G = np.array([dissimilarity(images) for images in images_GMHWC])
    decided_G, pairs_G = np.array([history[group[0].prompt] for group in groups]).T
    nobody_G = np.zeros(len(groups))
    information_G = expected_information(different_G, decided_G, pairs_G, nobody_G, nobody_G)
    return [int(g) for g in np.argsort(-information_G, kind="stable")[: arguments.judged]]


def training_set(
    groups: list[list[ImageSeed]], chosen: list[int], good_GM: np.ndarray, latents: torch.Tensor,
    log_probs: torch.Tensor,
) -> TrainingSet:  # fmt: skip
    """Unmarked images win over marked ones of their group."""
    size = good_GM.shape[1]
    paired = []
    for g in chosen:
        ids = range(g * size, (g + 1) * size)
        pairs = tuple((w, l, 1.0) for w, a in zip(ids, good_GM[g], strict=True)
                      for l, b in zip(ids, good_GM[g], strict=True) if a and not b)  # noqa: E741  # fmt: skip
        if pairs:
            paired.append(PairedGroup(tuple(ids), pairs))
    images = [image for group in groups for image in group]
    noise = [image.noise_seed for image in images]
    return TrainingSet([image.prompt for image in images], latents, log_probs, paired, noise)


def judgements_needed(curve: Curve, level: float) -> float | None:
    """Judged groups at which the curve first reaches a level, between its points by a straight line."""
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if y1 >= level:
            return x0 + (x1 - x0) * max(0.0, (level - y0) / (y1 - y0)) if y1 > y0 else float(x1)
    return None


def table(curves: dict[str, list[Curve]]) -> None:
    """Judged groups needed for a level, of the seeds' mean curves, and the share that the order saves."""
    means = {order: mean_curve(lines) for order, lines in curves.items()}
    print("\nheld-out   judged groups, random   by information   saved")
    for level in LEVELS:
        needed = {order: judgements_needed(line, level) for order, line in means.items()}
        a, b = needed["random"], needed["information"]
        shown = [f"{n:.0f}" if n is not None else "-" for n in (a, b)]
        print(f"{level:.2f}       {shown[0]:>21}   {shown[1]:>14}   {f'{1 - b / a:.0%}' if a and b else '-':>5}")


def mean_curve(lines: list[Curve]) -> Curve:
    """Mean over seeds at every number of judged groups."""
    return [(points[0][0], statistics.mean(score for _, score in points)) for points in zip(*lines, strict=True)]


def draw(curves: dict[str, list[Curve]], path: Path) -> None:
    """Every seed thin, the mean thick."""
    plt.rcParams.update({"font.size": 13, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(figsize=(8, 4.8), layout="constrained")
    for (order, lines), color in zip(curves.items(), ("#1f6fb4", "#c8642c"), strict=True):
        for line in lines:
            axes.plot(*zip(*line, strict=True), color=color, linewidth=0.8, alpha=0.45)
        label = f"asked by expected information ({len(lines)} seeds)" if order == "information" else "asked at random"
        axes.plot(*zip(*mean_curve(lines), strict=True), color=color, linewidth=2.8, label=label)
    axes.set(xlabel="groups that a person judged so far", ylabel="held-out images drawn right (share)", ylim=(0.35, 1))
    axes.set_xlim(left=0)
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.legend(loc="lower right", frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=160, metadata={"Software": None})


if __name__ == "__main__":
    main()
