"""A round's optimizer, and the check that gradients are large enough for its eps."""

from collections.abc import Iterable
from typing import Any

import torch

from d3po_core.config import PAPERS_BETA, TrainConfig
from d3po_core.errors import D3POError
from d3po_core.models.policy import Policy
from d3po_core.records import DROWNED

# At this beta a margin of 1 nat already saturates the loss, and a sum may move by thousands of nats.
LARGEST_BETA = 20.0


def make_optimizer(policy: Policy, config: TrainConfig) -> torch.optim.Optimizer:
    """Return AdamW over the trained weights.

    Raises:
        D3POError: the configured optimizer's library is not installed.
    """
    parameters = [parameter for _, parameter in policy.weights.parameters()]
    kind = optimizer_class(config)
    if config.optimizer == "adamw8bit":
        for parameter in parameters:  # else it does so itself, and its moments keep the old layout
            parameter.data = parameter.data.contiguous()
    return kind(
        parameters, lr=config.learning_rate, betas=config.adam_betas, eps=config.adam_eps,
        weight_decay=config.weight_decay,
    )  # fmt: skip


def optimizer_class(config: TrainConfig) -> Any:
    """Return the configured optimizer class.

    Raises:
        D3POError: its library is not installed.
    """
    if config.optimizer == "adamw":
        return torch.optim.AdamW
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise D3POError(
            f"train.optimizer is 'adamw8bit', whose library cannot be imported ({' '.join(str(error).split())}); "
            "install the extra (pip install -e '.[adam8bit]'), or set it to 'adamw'"
        ) from None
    return AdamW8bit


def check_beta(config: TrainConfig) -> None:
    """Refuse a beta meant for the other log_prob scale.

    Raises:
        D3POError: log_probs are sums, but beta is scaled for means.
    """
    if config.log_prob == "sum" and config.beta > LARGEST_BETA:
        raise D3POError(
            f"train.beta is {config.beta:g} with train.log_prob 'sum'; expected at most {LARGEST_BETA:g}, since the "
            f"paper's is {PAPERS_BETA:g}: a beta for 'mean' is that times the number of latent elements. "
            "Leave train.beta out, or set train.log_prob to 'mean'"
        )


def drowned_share(gradients: Iterable[torch.Tensor | None], eps: float) -> float:
    """Return the share of trained weights that AdamW's eps stops: 0 < |gradient| < eps.

    AdamW divides a gradient by its own size plus eps. Zero gradients do not count, since they move nothing anyway: a
    LoRA's first half has them while its second half is 0.
    """
    there = [gradient for gradient in gradients if gradient is not None]
    if not there:
        return 0.0
    small = torch.stack([((gradient != 0) & (gradient.abs() < eps)).sum() for gradient in there])
    return int(small.sum()) / sum(gradient.numel() for gradient in there)


def drowned_warning(share: float | None, config: TrainConfig) -> str | None:
    """Return a warning if eps stopped this large a share of the weights, else None."""
    if share is None or share <= DROWNED:
        return None
    return (
        f"{share:.0%} of the trained weights had gradients below train.adam_eps ({config.adam_eps:g}) and hardly "
        "moved; set train.adam_eps to 1e-15"
    )
