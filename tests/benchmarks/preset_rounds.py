"""The first rounds of each preset for real models, on a small model of the same family, several seeds.

    python tests/benchmarks/preset_rounds.py

No weights of real models are needed: a preset's learning settings (its section ``train``, group size, LoRA's rank)
train the embedded model, or for ``sdxl`` the same weights in Stable Diffusion XL's architecture. What does not bear on
learning is small: images, steps, prompts of the shapes world, and no half precision. The preset's own scorer judges;
for people who mark bad images, a program that marks the lower half of each group by that scorer. ``former`` is what
``sd15`` had before: beta 0.1 on means, AdamW's eps of 1e-8, 16 updates for 256 images. Needs d3po_core and neither
Prefect nor MLflow. The JSON is written after every campaign.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from common import RESULTS, machine, write_json
from rich.console import Console
from rich.table import Table
from small_xl import make_small_xl

from d3po_core.config import CampaignConfig
from d3po_core.config_values import load_config, merge
from d3po_core.models.loaded import load_policy
from d3po_core.models.policy import Policy
from d3po_core.paths import PROJECT_ROOT
from d3po_core.sampling.prompts import draw_prompts, load_prompts
from d3po_core.sampling.rollout import draw_images
from d3po_core.scorers.finding import load_scorer
from d3po_core.seeds import ImageSeed, evaluation_seeds, member_seed
from d3po_core.training.lesson import TrainingSet
from d3po_core.training.optimizer import make_optimizer
from d3po_core.training.packing import PairedGroup
from d3po_core.training.training_set import measure_round, train_round

PRESETS = ("former", "sd15", "sd15-human", "sdxl")
FORMER = {
    "learning_rate": 3e-5, "beta": 0.1, "log_prob": "mean", "clip": "one_sided", "adam_eps": 1e-8, "epochs": 1,
}  # fmt: skip
FORMER_UPDATES_PER_IMAGE = 16 / 256
BATCH = 64

Row = dict[str, Any]


def main() -> None:
    """Run the campaigns, print, write."""
    arguments = _arguments()
    before, rows = machine() | {"torch_threads": torch.get_num_threads()}, list[Row]()
    with tempfile.TemporaryDirectory() as folder:
        for preset in arguments.presets:
            config = small_config(preset, arguments, Path(folder))
            policy = load_policy(config.model, seed=0)
            for seed in arguments.seeds:
                rows += campaign(policy, config.model_copy(update={"seed": seed}), preset, arguments)
                write_json(arguments.out / "preset_rounds.json", vars(arguments), before, {"rounds": rows})
    show(rows, arguments)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=list(PRESETS), help="which (all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="campaign seeds (0 1 2)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds a campaign (3)")
    parser.add_argument("--images", type=int, default=128, help="images a round (128)")
    parser.add_argument("--steps", type=int, default=10, help="denoising steps (10)")
    parser.add_argument("--guidance", type=float, default=1.0, help="guidance scale, that of the embedded model (1)")
    parser.add_argument("--images-per-prompt", type=int, default=16, help="evaluation images a held-out prompt (16)")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="change a field of train")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON")
    return parser.parse_args()


def small_config(preset: str, arguments: argparse.Namespace, folder: Path) -> CampaignConfig:
    """The preset's learning settings, with a small model and the shapes world."""
    deployments = yaml.safe_load((PROJECT_ROOT / "prefect.yaml").read_text())["deployments"]
    name = "sd15" if preset == "former" else preset
    values = next(d["parameters"]["config"] for d in deployments if d["name"] == name)
    size = values["sample"]["group_size"]
    train = dict(values["train"])
    if preset == "former":
        train |= FORMER | {"updates_per_round": round(FORMER_UPDATES_PER_IMAGE * arguments.images)}
    for setting in arguments.set:
        field, _, text = setting.partition("=")
        train[field] = yaml.safe_load(text)
    model = {"device": "cpu", "lora_rank": values["model"]["lora_rank"]}
    if preset == "sdxl":
        model["path"] = str(make_small_xl(folder / "small-xl"))
    sample = {
        "group_size": size, "groups_per_round": round(arguments.images / size), "num_steps": arguments.steps,
        "guidance_scale": arguments.guidance, "batch_size": BATCH // size * size,
    }  # fmt: skip
    judge = {"labeller": values["judge"].get("labeller", "proxy"), "scorers": ["jpeg_incompressibility"]}
    return load_config(merge({"train": train}, {"model": model, "sample": sample, "judge": judge}), preset)


def campaign(policy: Policy, config: CampaignConfig, preset: str, arguments: argparse.Namespace) -> list[Row]:
    """Rounds of sampling, judging and training; a row for each checkpoint."""
    policy.reset()
    optimizer = make_optimizer(policy, config.train)
    rows: list[Row] = []
    for number in range(arguments.rounds + 1):
        started, row = time.perf_counter(), {"preset": preset, "seed": config.seed, "round": number}
        if number:
            data = judged_round(policy, config, number)
            updates = list(train_round(policy, optimizer, [data], config, number))
            learned = measure_round(policy, [data], config, number)
            assert learned is not None
            row |= {
                "updates": len(updates), "accuracy_before": np.mean([u.pair_accuracy_before for u in updates]),
                "accuracy_after": learned.pair_accuracy, "kl_after": learned.kl,
                "drowned": np.mean([u.drowned for u in updates]),
            }  # fmt: skip
        row["held_out"] = held_out(policy, config, arguments.images_per_prompt)
        rows.append(row)
        print({key: round(float(v), 6) if isinstance(v, float) else v for key, v in row.items()},
              f"{time.perf_counter() - started:.0f} s", flush=True)  # fmt: skip
    return rows


def judged_round(policy: Policy, config: CampaignConfig, number: int) -> TrainingSet:
    """A round's groups, judged by the scorer: an image beats every one of its group with a lower score."""
    prompts = load_prompts(config.sample.prompts, config.sample.prompt_column, "sample.prompts")
    size = config.sample.group_size
    seeds = [
        member_seed(config.seed, number, prompt, occurrence, member, True)
        for prompt, occurrence in draw_prompts(prompts, config.sample.groups_per_round, config.seed, number)
        for member in range(size)
    ]
    latents, log_probs, scores = draw_and_judge(policy, config, seeds)
    groups = []
    for first in range(0, len(seeds), size):
        ids = range(first, first + size)
        if config.judge.labeller == "human":  # an image is marked bad, or it is not
            scores[ids] = scores[ids] > np.median(scores[ids])
        pairs = tuple((a, b, 1.0) for a in ids for b in ids if scores[a] > scores[b])
        if pairs:
            groups.append(PairedGroup(tuple(ids), pairs))
    noise = [seed.noise_seed for seed in seeds]
    return TrainingSet([seed.prompt for seed in seeds], latents, log_probs, groups, noise)


def draw_and_judge(
    policy: Policy, config: CampaignConfig, seeds: list[ImageSeed]
) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Latents, log_probs and scores of images."""
    scorer = load_scorer(config.judge.scorers[0], config.scoring, "cpu", "fast")
    latents, log_probs, scores = [], [], []
    for start in range(0, len(seeds), config.sample.batch_size):
        part = seeds[start : start + config.sample.batch_size]
        drawn, images = draw_images(policy, config.sample, part, torch.float32)
        latents.append(drawn.latents_BTCHW)
        log_probs.append(drawn.log_probs_BT)
        scores.append(scorer(images, [seed.prompt for seed in part]))
    return torch.cat(latents), torch.cat(log_probs), np.concatenate(scores)


def held_out(policy: Policy, config: CampaignConfig, images_per_prompt: int) -> float:
    """Mean score of the held-out images; the same prompts and noise in all rounds of a seed."""
    prompts = load_prompts(config.evaluate.prompts, config.evaluate.prompt_column, "evaluate.prompts")
    return float(draw_and_judge(policy, config, evaluation_seeds(prompts, images_per_prompt, config.seed))[2].mean())


def show(rows: list[Row], arguments: argparse.Namespace) -> None:
    """Print each preset's held-out score after each round, and what its last round's training saw."""
    table = Table(title=f"held-out score, mean of {len(arguments.seeds)} seeds [smallest, largest]")
    for column in ("preset", "base", *(f"round {n}" for n in range(1, arguments.rounds + 1)), "gain", "updates",
                   "accuracy before, after", "KL after", "drowned"):  # fmt: skip
        table.add_column(column)
    for preset in dict.fromkeys(row["preset"] for row in rows):
        mine = [row for row in rows if row["preset"] == preset]
        by_round = [[r["held_out"] for r in mine if r["round"] == n] for n in range(arguments.rounds + 1)]
        last = [row for row in mine if row["round"] == arguments.rounds]
        means = {key: float(np.mean([row[key] for row in last])) for key in last[0] if key not in ("preset", "seed")}
        gains = np.array(by_round[-1]) - np.array(by_round[0])
        table.add_row(
            preset, *(f"{np.mean(v):.4f}" for v in by_round),
            f"{gains.mean():+.4f} [{gains.min():+.4f}, {gains.max():+.4f}]", f"{means['updates']:.0f}",
            f"{means['accuracy_before']:.2f}, {means['accuracy_after']:.2f}", f"{means['kl_after']:.1e}",
            f"{means['drowned']:.0%}",
        )  # fmt: skip
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
