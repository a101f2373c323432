"""A job process's policy: loaded once, with weights always read from a checkpoint file."""

import torch

from d3po_core.config import CampaignConfig, ModelConfig
from d3po_core.models.checkpoint import load_round
from d3po_core.models.loading import load_family
from d3po_core.models.policy import Policy

_loaded: dict[str, Policy] = {}


def loaded_policy(config: CampaignConfig) -> Policy:
    """Return the campaign's policy, loaded once per process and kept between stages and rounds.

    Cached embeddings depend on the thread count. The policy is reloaded when it changes, so that a round gives the same
    bytes as in a fresh process.
    """
    key = f"{config.model.model_dump_json()} {config.seed} {torch.get_num_threads()}"
    if key not in _loaded:
        _loaded.clear()
        _loaded[key] = load_policy(config.model, config.seed)
    return _loaded[key]


def policy_at(config: CampaignConfig, round_number: int) -> Policy:
    """Return the loaded policy with the weights of a round's checkpoint; round 0 is the base model.

    The weights always come from the checkpoint file, never from memory. A killed and resumed round therefore computes
    with the same numbers as an uninterrupted one.
    """
    policy = loaded_policy(config)
    load_round(config.folder, round_number, policy)
    return policy


def load_policy(config: ModelConfig, seed: int) -> Policy:
    """Load the base model and add an untrained LoRA, or make its whole network trainable.

    Args:
        config: the model's location and its trained part.
        seed: seed of the LoRA's initial weights.

    Raises:
        D3POError: the model is missing or unreadable; the message is one line and says what to do.
    """
    return Policy(load_family(config), config, seed)
