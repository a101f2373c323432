"""A job process's policy: loaded once, with weights always read from a checkpoint file."""

from pathlib import Path

import torch

from d3po_core.config import CampaignConfig, ModelConfig
from d3po_core.devices import device_type
from d3po_core.errors import D3POError
from d3po_core.models.asked import Asked, asked_by
from d3po_core.models.checkpoint import load_round
from d3po_core.models.loading import load_family
from d3po_core.models.memory import Card, read_plan, write_plan
from d3po_core.models.policy import Policy

_loaded: dict[str, Policy] = {}


def loaded_policy(config: CampaignConfig) -> Policy:
    """Return the campaign's policy, loaded once per process and kept between stages and rounds.

    Cached embeddings depend on the thread count. The policy is reloaded when it changes, so that a round gives the same
    bytes as in a fresh process.
    """
    asked = asked_by(config)
    key = f"{config.model.model_dump_json()} {config.seed} {torch.get_num_threads()} {asked}"
    if config.model.memory == "auto":
        key += f" {config.folder}"  # a campaign keeps its own plan
    if key not in _loaded:
        _loaded.clear()
        _loaded[key] = policy = load_policy(config.model, config.seed, config.folder, asked)
        if policy.plan.needs and policy.accelerator.is_main_process:  # it was measured, now or earlier
            write_plan(config.folder, config.model, Card(), policy.plan)
    return _loaded[key]


def policy_at(config: CampaignConfig, round_number: int) -> Policy:
    """Return the loaded policy with the weights of a round's checkpoint; round 0 is the base model.

    The weights always come from the checkpoint file, never from memory. A killed and resumed round therefore computes
    with the same numbers as an uninterrupted one.
    """
    policy = loaded_policy(config)
    load_round(config.folder, round_number, policy)
    return policy


def load_policy(config: ModelConfig, seed: int, campaign: Path | None = None, asked: Asked | None = None) -> Policy:
    """Load the base model and add an untrained LoRA, or make its whole network trainable.

    Args:
        config: the model's location and its trained part.
        seed: seed of the LoRA's initial weights.
        campaign: the folder that keeps the plan of ``model.memory: auto``; without it the GPU is measured.
        asked: the sizes and texts that the campaign draws.

    Raises:
        D3POError: the model is missing or unreadable, or does not fit the GPU; one line that says what to do.
    """
    plan = None
    if config.memory == "auto" and campaign is not None and device_type(config.device) == "cuda":
        plan = read_plan(campaign, config, Card())
    try:
        return Policy(load_family(config), config, seed, plan, asked)
    except torch.OutOfMemoryError:
        raise D3POError(
            f"model.path {config.path!r}: a first pass of one image does not fit the GPU's memory; free some "
            "(nvidia-smi shows who uses it), set model.precision fp16 and model.memory auto, or take a smaller model"
        ) from None
