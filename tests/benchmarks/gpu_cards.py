"""Sample and train under the memory of smaller cards: SD 1.5, SDXL and SD 3 medium on 12, 16, 24 and 48 GB.

    python tests/benchmarks/gpu_cards.py                         about eight minutes on one H100; no weights, no network
    python tests/benchmarks/gpu_cards.py --models sdxl --cards 24 --memory auto,medium,small
    python tests/benchmarks/gpu_cards.py --smoke                 the embedded model on a CPU: only shows that this runs

Random weights at the published sizes, fp16, guidance 5, LoRA of the presets' rank, groups of 2. In each case, a process
of its own, PyTorch may allocate only so many GB (1e9 bytes). A card of 12 GB has 12.9e9 bytes; the difference is for
CUDA's context and the desktop. Scoring is a model of PickScore's size (CLIP ViT-H) beside the idle network. Images/s
is for 20 steps, computed from draws of 2 and of 6; a pair-step is one pair at one step. A case that does not fit
shows the line that a user would read. JSON lines go to ``$OUT``, or to benchmark-results/.
"""

import argparse
import gc
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import RESULTS
from rich.console import Console
from rich.table import Table

from d3po_core.config import ModelConfig, SampleConfig, TrainConfig
from d3po_core.errors import D3POError
from d3po_core.models.families import FAMILIES
from d3po_core.models.loaded import load_policy
from d3po_core.models.memory import MemoryPlan
from d3po_core.models.policy import Policy
from d3po_core.sampling.rollout import draw_images
from d3po_core.seeds import ImageSeed, derive_seed
from d3po_core.training.lesson import TrainingSet
from d3po_core.training.optimizer import make_optimizer
from d3po_core.training.packing import PairedGroup
from d3po_core.training.trainer import train_updates

GUIDANCE, STEPS, FEW_STEPS = 5.0, 20, (2, 6)
RANKS = {"sd15": 4, "sdxl": 8, "sd3": 8, "embedded": 4}
# Images, and image-steps, at once in the presets; a plan may take fewer.
BATCH = {"sd15": 64, "sdxl": 16, "sd3": 16, "embedded": 4}
MICRO_BATCH = {"sd15": 40, "sdxl": 16, "sd3": 16, "embedded": 4}
COLUMNS = ("model", "card GB", "memory", "sampling GB", "training GB", "scoring GB", "images/s", "pair-steps/s", "plan")
Row = dict[str, Any]


def main() -> None:
    """Measure all cases, print a table, write JSON lines."""
    arguments = _arguments()
    if arguments.case:
        _case(*arguments.case.split(","), compiled=arguments.compile)
        return
    models, cards = (["embedded"], [0]) if arguments.smoke else (arguments.models, arguments.cards)
    cases = list(itertools.product(models, cards, arguments.memory))
    output = Path(os.environ["OUT"]) if "OUT" in os.environ else RESULTS
    output.mkdir(parents=True, exist_ok=True)
    table = Table(*COLUMNS)
    with (output / "gpu_cards.jsonl").open("a") as lines:
        for row in _measured(cases, arguments):
            lines.write(json.dumps(row) + "\n")
            lines.flush()
            print(json.dumps(row), flush=True)
            table.add_row(*(_cell(row.get(column)) for column in COLUMNS))
    Console(width=200).print(table)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words = {"type": lambda text: text.split(",")}
    parser.add_argument("--models", **words, default=["sd15", "sdxl", "sd3"], help="by commas (all)")
    parser.add_argument("--memory", **words, default=["auto"], help="values of model.memory, by commas (auto)")
    parser.add_argument("--cards", type=lambda text: [int(gb) for gb in text.split(",")], default=[12, 16, 24, 48],
                        help="GB, by commas")  # fmt: skip
    parser.add_argument("--compile", action="store_true", help="compiled blocks: minutes more per case")
    parser.add_argument("--seconds", type=float, default=470, help="begin no further case after so many (470)")
    parser.add_argument("--smoke", action="store_true", help="the embedded model on a CPU")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    return parser.parse_args()


def _measured(cases: list[tuple[str, int, str]], arguments: argparse.Namespace) -> Iterator[Row]:
    """Measure case after case; the next process already imports its libraries and waits for a line."""
    started = time.monotonic()
    waiting = _begin(cases[0], arguments)
    for case, following in itertools.zip_longest(cases, cases[1:]):
        row: Row = {"model": case[0], "card GB": case[1], "memory": case[2]}
        if time.monotonic() - started > arguments.seconds:
            waiting.kill()
            print(f"stopped before {case}: {arguments.seconds:.0f} s are over", flush=True)
            return
        process, waiting = waiting, _begin(following, arguments) if following else waiting
        began = time.monotonic()
        out, error = process.communicate("go\n")
        found = json.loads(out.splitlines()[-1]) if process.returncode == 0 else {"plan": _last_line(error)}
        yield row | found | {"seconds": round(time.monotonic() - began, 1)}


def _begin(case: tuple[str, int, str], arguments: argparse.Namespace) -> "subprocess.Popen[str]":
    command = [sys.executable, __file__, "--case", ",".join(map(str, case))]
    return subprocess.Popen(
        command + ["--compile"] * arguments.compile, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def _last_line(error: str) -> str:
    return next((line for line in reversed(error.splitlines()) if line.strip()), "it died without a word")


def _cell(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else "" if value is None else str(value)


def _case(model: str, card: str, memory: str, compiled: bool) -> None:
    """Measure one case in this process, and print it as JSON."""
    sys.stdin.readline()
    device = "cpu" if model == "embedded" else "cuda"
    config = ModelConfig.model_validate(
        {"device": device, "memory": memory, "lora_rank": RANKS[model], "compile": compiled,
         "precision": "no" if device == "cpu" else "fp16"}
    )  # fmt: skip
    scorer = _scorer() if device == "cuda" else None
    try:
        policy = _policy(model, config, int(card) * 10**9)
        row = _sampling(policy, model) | _training(policy, model)
        if scorer is not None:
            row |= {"scoring GB": _scoring(policy, scorer)}
    except D3POError as error:
        row = {"plan": str(error)}
    except torch.OutOfMemoryError as error:
        row = {"plan": f"out of memory: {str(error).splitlines()[0][:120]}"}
    else:
        row["plan"] = str(MemoryPlan(**policy.memory_used()))  # with what a lack of memory halved
        row |= {"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}
    print(json.dumps(row))


def _policy(model: str, config: ModelConfig, allowed: int) -> Policy:
    """A policy over random weights, loaded as a user's: on the CPU at first, and with an XL VAE in single precision."""
    if model == "embedded":
        return load_policy(config, seed=0)
    from random_models import random_pipeline

    pipeline = random_pipeline(model, torch.float16, "cuda")
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            part.to("cpu")
    if model != "sd15":
        pipeline.vae.to(torch.float32)
    _free()
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / total))
    return Policy(FAMILIES[type(pipeline).__name__](pipeline), config, seed=0)


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peak() -> float | None:
    return torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None


def _seeds(count: int) -> list[ImageSeed]:
    """Seeds of images in groups of two that share an x_T."""
    return [ImageSeed(f"a red circle {i // 2}", derive_seed(i // 2, "x_T"), derive_seed(i, "noise"))
            for i in range(count)]  # fmt: skip


def _timed_draw(policy: Policy, images: int, steps: int) -> float:
    config = SampleConfig(num_steps=steps, guidance_scale=GUIDANCE, batch_size=images, latent_dtype="float16")
    if policy.device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    draw_images(policy, config, _seeds(images), torch.float16)
    return time.perf_counter() - started


def _sampling(policy: Policy, model: str) -> Row:
    images = min(BATCH[model], policy.sampling_rows.of(BATCH[model]) * 2)  # two passes show what a batch takes
    _free()
    _timed_draw(policy, images, FEW_STEPS[0])  # chooses kernels
    _free()
    few, more = (_timed_draw(policy, images, steps) for steps in FEW_STEPS)
    whole = few + (STEPS - FEW_STEPS[0]) * max(0.0, more - few) / (FEW_STEPS[1] - FEW_STEPS[0])
    return {"sampling GB": _peak(), "images/s": images / whole}


def _training(policy: Policy, model: str) -> Row:
    """The peak of an update's passes at the plan's size, and the rate of a second update."""
    steps = FEW_STEPS[1]
    rows = policy.training_rows.of(MICRO_BATCH[model])
    num_groups = max(2, -(-2 * rows // (2 * steps)))
    config = SampleConfig(num_steps=steps, guidance_scale=GUIDANCE, batch_size=64, latent_dtype="float16")
    seeds = _seeds(2 * num_groups)
    drawn, _ = draw_images(policy, config, seeds, torch.float16)
    groups = [PairedGroup((2 * g, 2 * g + 1), ((2 * g, 2 * g + 1, 1.0),)) for g in range(num_groups)]
    noise = [seed.noise_seed for seed in seeds]
    data = TrainingSet([seed.prompt for seed in seeds], drawn.latents_BTCHW, drawn.log_probs_BT, groups, noise)
    train = TrainConfig(
        learning_rate=1e-5, micro_batch=MICRO_BATCH[model], updates_per_round=2, epochs=2, beta=0.1, measured_share=0
    )
    schedule = policy.schedule(steps, 1.0)
    _free()
    *_, update = train_updates(policy, make_optimizer(policy, train), schedule, data, train, GUIDANCE, seed=0)
    trained = int(schedule.trainable_T.sum())
    return {"training GB": _peak(), "pair-steps/s": update.num_pairs * trained / update.seconds}


def _scorer() -> Any:
    """CLIP ViT-H as PickScore has it, with random weights, waiting in main memory."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16,
                              patch_size=14, image_size=224, projection_dim=1024)  # fmt: skip
    with torch.device("cuda"):
        judge = CLIPVisionModel(config)
    judge = judge.half().to("cpu")
    _free()
    return judge


@torch.inference_mode()
def _scoring(policy: Policy, judge: Any) -> float | None:
    """The peak while 32 images are scored beside the network; the text half of the scorer is added as 0.7 GB."""
    _free()
    text = torch.empty(350_000_000, dtype=torch.float16, device=policy.device)
    judge.to(policy.device)
    judge(torch.zeros(32, 3, 224, 224, dtype=torch.float16, device=policy.device))
    del text
    return _peak()


if __name__ == "__main__":
    main()
