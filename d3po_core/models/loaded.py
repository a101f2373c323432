"""The policy of a process that runs jobs: loaded once, its weights always from a checkpoint's file."""

import torch

from d3po_core.config import CampaignConfig, ModelConfig
from d3po_core.models.checkpoint import load_round
from d3po_core.models.loading import load_family
from d3po_core.models.policy import Policy

_loaded: dict[str, Policy] = {}


def loaded_policy(config: CampaignConfig) -> Policy:
    """The campaign's policy, loaded once in the life of the process and kept between stages and rounds.

    Loaded again when the process computes on another number of threads: the embeddings that a policy remembers were
    rounded as on those it had, and a round is to be what a process that has its threads from the start makes of it.
    """
    key = f"{config.model.model_dump_json()} {config.seed} {torch.get_num_threads()}"
    if key not in _loaded:
        _loaded.clear()
        _loaded[key] = load_policy(config.model, config.seed)
    return _loaded[key]


def policy_at(config: CampaignConfig, round_number: int) -> Policy:
    """The loaded policy with the weights of a round's checkpoint; round 0 is the base model.

    The weights always come from the checkpoint's file, never from what an earlier stage left in memory: a killed and
    resumed round then computes with the same numbers as one that was not killed.
    """
    policy = loaded_policy(config)
    load_round(config.folder, round_number, policy)
    return policy


def load_policy(config: ModelConfig, seed: int) -> Policy:
    """Load the base model and give it an untrained LoRA, or make all of its network trainable.

    Args:
        config: where the model is and what of it is trained.
        seed: seed of the LoRA's initial weights.

    Raises:
        D3POError: no such model, or it cannot be read; one line that says what to do.
    """
    return Policy(load_family(config), config, seed)
