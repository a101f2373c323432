"""How far three updates of a preset move a network, and which share of its gradients AdamW's eps drowns.

    python tests/benchmarks/update_size.py

On the embedded model, and on Stable Diffusion 1.5's UNet with random weights (latents of 16 x 16, so that two minutes
of one core do). Three updates of one pair each, at four steps, by the preset ``sd15`` and by what it was before; then
the KL of the pairs' steps to the policy that sampled them. Random weights say what the architecture's size does, no
more.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import random_models
import torch
from common import RESULTS, machine, write_json
from preset_rounds import FORMER
from rich.console import Console
from rich.table import Table

from d3po.flows.presets import deployment_config
from d3po_core.config import ModelConfig, TrainConfig
from d3po_core.models.families import FAMILIES
from d3po_core.models.loaded import load_policy
from d3po_core.models.policy import Policy
from d3po_core.sampling.prompts import load_prompts
from d3po_core.sampling.rollout import sample_trajectories
from d3po_core.seeds import member_seed
from d3po_core.training.lesson import TrainingSet
from d3po_core.training.optimizer import make_optimizer
from d3po_core.training.packing import PairedGroup
from d3po_core.training.trainer import measure_learned, train_updates

GROUPS, STEPS = 3, 4
SMALL_VAE: dict[str, Any] = {
    "block_out_channels": (8,) * 4, "norm_num_groups": 4, "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4, "layers_per_block": 1, "latent_channels": 4,
}  # fmt: skip


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON")
    arguments, before, rows = parser.parse_args(), machine(), list[dict[str, Any]]()
    table = Table(title=f"after {GROUPS} updates of one pair each")
    for column in ("network", "settings", "elements", "KL, nats per element and step", "of all elements", "drowned"):
        table.add_column(column)
    own = deployment_config("sd15", None, []).train.model_copy(update={"epochs": 1, "measured_share": 1.0})
    former = own.model_copy(update=FORMER)
    for network, make in (("embedded", _embedded), ("Stable Diffusion 1.5", _stable_diffusion)):
        policy = make()
        for settings, config in (("sd15", own), ("former", former)):
            row = {"network": network, "settings": settings} | measure(policy, config)
            rows.append(row)
            per_step = row["kl"] * row["elements"]
            table.add_row(network, settings, str(row["elements"]), f"{row['kl']:.1e}", f"{per_step:.2f}",
                          f"{row['drowned']:.0%}")  # fmt: skip
        write_json(arguments.out / "update_size.json", {}, before, {"rows": rows})
    Console(width=140).print(table)


def _embedded() -> Policy:
    return load_policy(ModelConfig(device="cpu", lora_rank=4), seed=0)


def _stable_diffusion() -> Policy:
    random_models.VAE = SMALL_VAE
    random_models.UNETS["sd15"]["sample_size"] = 16
    pipeline = random_models.random_pipeline("sd15", torch.float32, "cpu")
    return Policy(FAMILIES[type(pipeline).__name__](pipeline), ModelConfig(device="cpu", lora_rank=4), seed=0)


def measure(policy: Policy, config: TrainConfig) -> dict[str, Any]:
    """KL to the base after the updates, and the share of drowned gradients at the last one."""
    started = time.perf_counter()
    policy.reset()
    schedule = policy.schedule(STEPS, 1.0)
    prompts = load_prompts("data/prompts/shapes_train.txt", "prompt", "prompts")[:GROUPS]
    seeds = [member_seed(0, 1, prompt, 0, member, True) for prompt in prompts for member in range(2)]
    drawn = sample_trajectories(policy, schedule, seeds, 1.0, torch.float32)
    groups = [PairedGroup((2 * g, 2 * g + 1), ((2 * g, 2 * g + 1, 1.0),)) for g in range(GROUPS)]
    noise = [seed.noise_seed for seed in seeds]
    data = TrainingSet([s.prompt for s in seeds], drawn.latents_BTCHW, drawn.log_probs_BT, groups, noise)
    updates = list(train_updates(policy, make_optimizer(policy, config), schedule, data, config, 1.0, seed=1))
    learned = measure_learned(policy, schedule, data, config, 1.0, seed=2)
    assert learned is not None
    return {
        "kl": learned.kl, "elements": drawn.latents_BTCHW[0, 0].numel(), "drowned": updates[-1].drowned,
        "seconds": time.perf_counter() - started,
    }  # fmt: skip


if __name__ == "__main__":
    main()
