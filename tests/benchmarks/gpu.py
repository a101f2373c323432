"""Sampling, training and memory on a GPU, beside the published loop's cost, with Stable Diffusion's architecture.

    python tests/benchmarks/gpu.py                      all parts; needs one GPU, no weights, no network
    python tests/benchmarks/gpu.py --parts ours,published

512 px, 20 steps, guidance 5, LoRA rank 4 on the attentions, random weights. A pair-step is one preference pair at one
denoising step, trained once. Parts: ``ceiling`` (a matrix product), ``equality`` (log_probs of every fast path against
eager float32), ``ours``, ``published``, ``memory`` (a table a mode and model), ``profile`` (kernels by time).
"""

import argparse
import gc
import itertools
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, machine, show, spread, write_json
from published_loop import PROMPTS_PER_BATCH, Published, encode, make_published, sample_groups, train_pair
from random_models import random_pipeline
from rich.console import Console
from rich.table import Table

from d3po_core.config import ModelConfig, SampleConfig, TrainConfig
from d3po_core.models.families import FAMILIES
from d3po_core.models.loading import DTYPES
from d3po_core.models.policy import Policy
from d3po_core.sampling.rollout import FirstOutputs, draw_images, replay_steps, start_drawing
from d3po_core.seeds import ImageSeed, derive_seed
from d3po_core.training.lesson import TrainingSet
from d3po_core.training.optimizer import make_optimizer
from d3po_core.training.packing import PairedGroup
from d3po_core.training.trainer import train_updates

PARTS = ("ceiling", "ours", "profile", "equality", "published", "memory")
MODES = ("fast", "balanced", "small")
# Of sampling: 1,000 images make 500 pairs in groups of 2; the deployment sd15 has groups of 4.
GROUP_SIZES = (2, 4)
PARTS_OF_OURS = ("ours", "profile", "equality")
STEPS, GUIDANCE, RANK = 20, 5.0, 4
# Sampled in a row, as a round of 256 images is: the next batch's noise is drawn while the GPU works.
BATCHES = 4
COMPARED_STEPS = (0, 5, 10, 15, 19)
# Per image of 512 px: a forward pass of the UNet, and one with the LoRA's backward pass (counted, TFLOP).
FORWARD_TFLOP, TRAIN_TFLOP = 0.804, 1.777
Results = dict[str, Any]


def main() -> None:
    """Measure the asked parts, print a table, write JSON."""
    arguments = _arguments()
    before = machine() | {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    results: Results = {}
    for part in arguments.parts:
        started = time.perf_counter()
        results[part] = globals()[f"measure_{part}"](arguments)
        if part not in PARTS_OF_OURS:
            _ours.clear()
        _free()
        print(f"-- {part}: {time.perf_counter() - started:.0f} s in all", flush=True)
        write_json(arguments.output, vars(arguments), before, results)
    report(results)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--parts", type=lambda text: text.split(","), default=list(PARTS), help="which, by commas (all)"
    )
    parser.add_argument("--batch", type=int, default=64, help="images, or image-steps of training, at once (64)")
    parser.add_argument("--repeats", type=int, default=3, help="turns of every measurement (3)")
    parser.add_argument("--precision", choices=("bf16", "fp16"), default="bf16", help="of our passes (bf16)")
    parser.add_argument("--no-compile", action="store_true", help="our passes without compilation")
    parser.add_argument("--models", type=lambda text: text.split(","), default=["sd15", "sdxl"], help="memory: models")
    parser.add_argument("--modes", type=lambda text: text.split(","), default=list(MODES), help="memory: modes (all)")
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu.json", help="JSON file")
    return parser.parse_args()


_ours: list[Policy] = []


def our_policy(arguments: argparse.Namespace) -> Policy:
    """The policy that is timed, compiled once for all parts that follow each other."""
    if not _ours:
        _ours.append(make_policy(precision=arguments.precision, compile=not arguments.no_compile))
    return _ours[0]


def _free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def make_policy(name: str = "sd15", **settings: Any) -> Policy:
    """A policy over random weights; the same weights for the same architecture."""
    config = ModelConfig(device="cuda", lora_rank=RANK, **settings)
    pipeline = random_pipeline(name, DTYPES[config.precision], "cuda")
    return Policy(FAMILIES[type(pipeline).__name__](pipeline), config, seed=0)


def seeds_of(count: int, group_size: int = 1) -> list[ImageSeed]:
    """Seeds of images in groups that share an x_T."""
    return [
        ImageSeed(f"a red circle {i // group_size}", derive_seed(i // group_size, "x_T"), derive_seed(i, "noise"))
        for i in range(count)
    ]


def sampling_config(batch: int) -> SampleConfig:
    """Settings of the comparison."""
    return SampleConfig(num_steps=STEPS, guidance_scale=GUIDANCE, batch_size=batch, latent_dtype="float16")


def measure_ceiling(arguments: argparse.Namespace) -> Results:
    """Rate of a large bf16 matrix product, TFLOP/s."""
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16).unbind(0)
    rates = [2 * 8192**3 / seconds / 1e12 for seconds in timed(lambda: a @ b, 20, warm_up=5)]
    print(f"matrix product: {show(spread(rates), 0)} TFLOP/s", flush=True)
    return {"tflops": spread(rates)}


def timed(work: Callable[[], Any], repeats: int, warm_up: int = 1) -> list[float]:
    """Seconds of each repeat, from idle to idle."""
    seconds = []
    for repeat in range(-warm_up, repeats):
        torch.cuda.synchronize()
        started = time.perf_counter()
        work()
        torch.cuda.synchronize()
        if repeat >= 0:
            seconds.append(time.perf_counter() - started)
    return seconds


def stir(policy: Policy) -> None:
    """Give the LoRA weights that matter, the same for every policy."""
    generator = torch.Generator().manual_seed(1)
    for _, parameter in policy.weights.parameters():
        noise = torch.randn(parameter.shape, generator=generator) * 0.05
        parameter.data += noise.to(parameter.device)


def measure_equality(arguments: argparse.Namespace) -> Results:
    """Difference of log_probs (nats per element) between each path and eager float32, over chosen steps."""
    seeds = seeds_of(8, 2)
    drawn, _ = draw_images(our_policy(arguments), sampling_config(8), seeds, torch.float16)
    latents_BTCHW = drawn.latents_BTCHW
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    reference = make_policy()
    torch.backends.cudnn.benchmark = False
    stir(reference)
    expected = _replay(reference, seeds, latents_BTCHW, gradient=False), _gradient(reference, seeds, latents_BTCHW)
    del reference
    torch.backends.cudnn.allow_tf32 = True
    results = _compare_path(f"{arguments.precision}, as timed", our_policy(arguments), seeds, latents_BTCHW, expected)
    for precision in ("bf16", "fp16"):
        policy = make_policy(precision=precision)
        torch.backends.cudnn.benchmark = False
        results |= _compare_path(f"{precision}, eager", policy, seeds, latents_BTCHW, expected)
        del policy
        _free()
    torch.backends.cudnn.benchmark = True
    return results


def _compare_path(
    name: str, policy: Policy, seeds: list[ImageSeed], latents_BTCHW: torch.Tensor,
    expected: tuple[torch.Tensor, torch.Tensor],
) -> Results:  # fmt: skip
    """One path as it samples and as it trains, each against float32, and the two against each other."""
    policy.reset()
    stir(policy)
    found = [_replay(policy, seeds, latents_BTCHW, gradient=gradient) for gradient in (False, True)]
    log_probs, gradient_P = expected
    sides = {"sampling": (found[0], log_probs), "training": (found[1], log_probs), "training to sampling": found}
    results: Results = {}
    for side, (ours, other) in sides.items():
        difference = (ours - other).abs()
        results[f"{name}, {side}"] = {"largest": difference.max().item(), "mean": difference.mean().item()}
        print(f"log_probs, {name}, {side}: largest {difference.max():.1e}, mean {difference.mean():.1e}", flush=True)
    ours_P = _gradient(policy, seeds, latents_BTCHW)
    relative = ((ours_P - gradient_P).norm() / gradient_P.norm()).item()
    results[f"{name}, gradient"] = {"relative": relative}
    print(f"gradient, {name}: relative difference {relative:.1e}", flush=True)
    return results


def _gradient(policy: Policy, seeds: list[ImageSeed], latents_BTCHW: torch.Tensor) -> torch.Tensor:
    """Gradient ``[P]`` of a sum of log_probs with signs that differ, as pairs have, with respect to the LoRA."""
    step, prompts = COMPARED_STEPS[2], [seed.prompt for seed in seeds]
    log_prob_B = replay_steps(
        policy, policy.schedule(STEPS, 1.0), prompts, latents_BTCHW[:, step], latents_BTCHW[:, step + 1],
        torch.full((len(seeds),), step), GUIDANCE,
    )[0]  # fmt: skip
    policy.network.zero_grad(set_to_none=True)
    sign_B = torch.tensor([1.0, -1.0], device=log_prob_B.device).repeat(len(seeds) // 2)
    policy.loss_scale.backward((sign_B * log_prob_B).sum())
    policy.loss_scale.unscale()
    gradient_P = torch.cat([p.grad.flatten() for _, p in policy.weights.parameters() if p.grad is not None])
    policy.network.zero_grad(set_to_none=True)
    return gradient_P


def _replay(policy: Policy, seeds: list[ImageSeed], latents_BTCHW: torch.Tensor, *, gradient: bool) -> torch.Tensor:
    schedule, prompts = policy.schedule(STEPS, 1.0), [seed.prompt for seed in seeds]
    with torch.set_grad_enabled(gradient):
        rows = [
            replay_steps(
                policy, schedule, prompts, latents_BTCHW[:, step], latents_BTCHW[:, step + 1],
                torch.full((len(seeds),), step), GUIDANCE,
            )[0].detach().cpu()
            for step in COMPARED_STEPS
        ]  # fmt: skip
    return torch.stack(rows, dim=1)


def measure_ours(arguments: argparse.Namespace) -> Results:
    """Images and pair-steps a second of this project, with the time that the first pass of each kind took."""
    started = time.perf_counter()
    policy = our_policy(arguments)
    results: Results = {"load_seconds": time.perf_counter() - started}
    results["first sampling, seconds"] = timed(lambda: draw(policy, arguments.batch, 1), 1, warm_up=0)[0]
    print(f"first batch {results['first sampling, seconds']:.0f} s", flush=True)
    for size in GROUP_SIZES:
        seconds = timed(lambda size=size: draw(policy, arguments.batch, BATCHES, size), arguments.repeats)  # type: ignore[misc]
        name = f"sampling, group {size}, images/s"
        results[name] = spread(BATCHES * arguments.batch / s for s in seconds)
        print(f"{name}: {show(results[name], 2)}", flush=True)
    for size in (2, 7):
        data = training_set(policy, arguments.batch // size, size)
        started = time.perf_counter()
        rates = training_rates(policy, data, arguments.batch, arguments.repeats)
        name = f"training, group {size}, pair-steps/s"
        results[name] = spread(rates)
        results[f"first training, group {size}, seconds"] = time.perf_counter() - started
        print(f"{name}: {show(results[name], 1)}", flush=True)
    results["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return results


def draw(policy: Policy, batch: int, batches: int, group_size: int = 2) -> None:
    """Sample and decode, each batch begun before the one before is waited for, as a round does."""
    config, seeds = sampling_config(batch), seeds_of(batch * batches, group_size)
    first, drawn = FirstOutputs(policy, config, seeds, torch.float16), None
    for start in range(0, len(seeds), batch):
        following = start_drawing(policy, config, seeds[start : start + batch], first)
        if drawn:
            drawn.wait()
        drawn = following
    assert drawn is not None
    drawn.wait()


def training_set(policy: Policy, num_groups: int, group_size: int) -> TrainingSet:
    """Sampled groups in which every pair has a winner."""
    seeds = seeds_of(num_groups * group_size, group_size)
    drawn, _ = draw_images(policy, sampling_config(len(seeds)), seeds, torch.float16)
    groups = []
    for index in range(num_groups):
        images = range(index * group_size, (index + 1) * group_size)
        pairs = tuple((winner, loser, 1.0) for winner, loser in itertools.combinations(images, 2))
        groups.append(PairedGroup(tuple(images), pairs))
    return TrainingSet(
        [seed.prompt for seed in seeds],
        drawn.latents_BTCHW,
        drawn.log_probs_BT,
        groups,
        [seed.noise_seed for seed in seeds],
    )


def training_rates(policy: Policy, data: TrainingSet, batch: int, repeats: int) -> list[float]:
    """Pair-steps a second of whole updates over all groups, after a small one that compiles."""
    config = TrainConfig(learning_rate=1e-5, micro_batch=batch, updates_per_round=repeats, epochs=repeats, beta=0.1)
    schedule, optimizer = policy.schedule(STEPS, 1.0), make_optimizer(policy, config)
    steps = int(schedule.trainable_T.sum())
    few = replace(data, groups=data.groups[: -(-batch // (steps * len(data.groups[0].images)))])
    once = config.model_copy(update={"updates_per_round": 1, "epochs": 1})
    for _ in train_updates(policy, optimizer, schedule, few, once, GUIDANCE, seed=0):
        pass
    updates = train_updates(policy, optimizer, schedule, data, config, GUIDANCE, seed=0)
    return [update.num_pairs * steps / update.seconds for update in updates]


def measure_published(arguments: argparse.Namespace) -> Results:
    """The same of the published loop: fp16, eager, batch 10 and batch 1, a second UNet as reference."""
    pipeline = random_pipeline("sd15", torch.float16, "cuda")
    config = ModelConfig(lora_rank=RANK)
    torch.cuda.reset_peak_memory_stats()
    model = make_published(pipeline, config, STEPS, 1.0, 0, GUIDANCE)
    prompts = [seed.prompt for seed in seeds_of(PROMPTS_PER_BATCH)]
    seconds = timed(lambda: sample_groups(model, prompts, 2), arguments.repeats)
    results: Results = {"sampling, images/s": spread(2 * PROMPTS_PER_BATCH / s for s in seconds)}
    print(f"published sampling: {show(results['sampling, images/s'], 2)} images/s", flush=True)
    (members,) = sample_groups(model, prompts, 2)
    optimizer, text_1LD = model.optimizer(), encode(model, prompts[:1])
    seconds = timed(lambda: train_pair(model, optimizer, text_1LD, members[0, 0], members[0, 1]), arguments.repeats)
    results["training, pair-steps/s"] = spread(STEPS / s for s in seconds)
    results["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    rate = show(results["training, pair-steps/s"], 2)
    print(f"published training: {rate} pair-steps/s, {results['peak_gb']:.1f} GB", flush=True)
    assert isinstance(model, Published)
    return results


def measure_memory(arguments: argparse.Namespace) -> Results:
    """Peak GB, images/s and pair-steps/s for every mode and model; without compilation, which the speeds above have."""
    results: Results = {}
    for name, mode in itertools.product(arguments.models, arguments.modes):
        results[f"{name}, {mode}"] = row = _measure_mode(name, mode, arguments.precision)
        _free()
        print(f"{name}, {mode}: " + ", ".join(f"{key} {value:.2f}" for key, value in row.items()), flush=True)
    return results


def _measure_mode(name: str, mode: str, precision: str) -> dict[str, float]:
    """Rates and peaks of one memory mode, eager."""
    batch = {"sd15": 32, "sdxl": 8}[name]
    policy = make_policy(name, precision=precision, memory=mode)
    draw(policy, batch, 1)  # the first pass chooses kernels
    torch.cuda.reset_peak_memory_stats()
    (seconds,) = timed(lambda: draw(policy, batch, 1), 1, warm_up=0)
    row = {"sampling GB": torch.cuda.max_memory_allocated() / 1e9, "images/s": batch / seconds}
    data = training_set(policy, {"fast": 4, "balanced": 2, "small": 1}[mode], 2)
    torch.cuda.reset_peak_memory_stats()
    (rate,) = training_rates(policy, data, batch, 1)
    return row | {"training GB": torch.cuda.max_memory_allocated() / 1e9, "pair-steps/s": rate}


def measure_profile(arguments: argparse.Namespace) -> Results:
    """Kernels by the time they take, of one sampling pass and of one training pass."""
    policy = our_policy(arguments)
    rows, shape = arguments.batch, policy.latent_shape
    latent, step = torch.randn(rows, *shape, device="cuda"), torch.full((rows,), 10, device="cuda")
    schedule = policy.schedule(STEPS, 1.0)
    prompts = [seed.prompt for seed in seeds_of(rows)]

    def one_pass(gradient: bool) -> None:
        with nullcontext() if gradient else torch.no_grad():
            result = replay_steps(policy, schedule, prompts, latent, latent, step, GUIDANCE)[0].sum()
        if gradient:
            result.backward()

    results: Results = {}
    for name, gradient, work in (("sampling", False, FORWARD_TFLOP), ("training", True, TRAIN_TFLOP)):
        seconds = spread(timed(lambda: one_pass(gradient), 3, warm_up=2))  # noqa: B023 (called at once)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            one_pass(gradient)
            torch.cuda.synchronize()
        events = sorted(profiler.key_averages(), key=lambda event: -event.self_device_time_total)
        kernels = [[event.key[:120], event.count, event.self_device_time_total / 1e3] for event in events]
        busy = sum(milliseconds for *_, milliseconds in kernels)
        rate = 2 * rows * work / seconds["median"]
        results[name] = {"seconds": seconds, "busy_ms": busy, "useful_tflops": rate, "kernels": kernels[:60]}
        print(f"{name} pass, {2 * rows} rows: {seconds['median'] * 1e3:.1f} ms, kernels {busy:.1f} ms, "
              f"{rate:.0f} TFLOP/s", flush=True)  # fmt: skip
        for key, count, milliseconds in kernels[:45]:
            print(f"   {milliseconds:7.2f} ms {count:4d} x {key[:95]}", flush=True)
    return results


def report(results: Results) -> None:
    """The comparison as a table."""
    if not {"ours", "published"} <= results.keys():
        return
    ours, published = results["ours"], results["published"]
    ceiling = results.get("ceiling", {}).get("tflops", {}).get("median")
    table = Table(title=r"median \[min, max]", title_justify="left")
    for column in ("what", "ours", "published loop", "ratio", "share of the ceiling"):
        table.add_column(column, justify="left" if column == "what" else "right", no_wrap=True)
    # Guidance doubles the rows; a pair of a group of G has G / (pairs) images of its own.
    costs = {
        "sampling, group 2, images/s": 2 * STEPS * FORWARD_TFLOP,
        "sampling, group 4, images/s": 2 * STEPS * FORWARD_TFLOP,
        "training, group 2, pair-steps/s": 2 * 2 * TRAIN_TFLOP,
        "training, group 7, pair-steps/s": 2 * 7 / 21 * TRAIN_TFLOP,
    }
    for name, tflop in costs.items():
        other = published["sampling, images/s" if name.startswith("sampling") else "training, pair-steps/s"]
        share = f"{ours[name]['median'] * tflop / ceiling:.0%}" if ceiling else ""
        ratio = ours[name]["median"] / other["median"]
        table.add_row(name, show(ours[name], 2), show(other, 2), f"{ratio:.1f}", share)
    Console(width=120).print(table)
    seconds = {
        side: 1000 / values[f"sampling,{group} images/s"]["median"]
        + 500 * STEPS / values[f"training,{group} pair-steps/s"]["median"]
        for side, values, group in (("ours", ours, " group 2,"), ("published", published, ""))
    }  # fmt: skip
    print(f"1,000 images and 500 pairs at these rates: {seconds['ours'] / 60:.1f} min, published "
          f"{seconds['published'] / 60:.1f} min (computed)")  # fmt: skip


if __name__ == "__main__":
    main()
