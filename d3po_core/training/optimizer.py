"""The optimizer of a round's training, and whether the gradients are large enough for it."""

from collections.abc import Iterable
from typing import Any

import torch

from d3po_core.config import PAPERS_BETA, TrainConfig
from d3po_core.errors import D3POError
from d3po_core.models.policy import Policy
from d3po_core.records import DROWNED

# A pair of log-ratios that are 1 nat apart, of the thousands that a sum may move by, is then already decided.
LARGEST_BETA = 20.0


def make_optimizer(policy: Policy, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over the trained weights.

    Raises:
        D3POError: the library of the optimizer that is asked for is not installed.
    """
    parameters = [parameter for _, parameter in policy.weights.parameters()]
    kind = optimizer_class(config)
    if config.optimizer == "adamw8bit":
        for parameter in parameters:  # else it does so itself, and its moments keep the layout from before
            parameter.data = parameter.data.contiguous()
    return kind(
        parameters, lr=config.learning_rate, betas=config.adam_betas, eps=config.adam_eps,
        weight_decay=config.weight_decay,
    )  # fmt: skip


def optimizer_class(config: TrainConfig) -> Any:
    """The optimizer that the configuration asks for.

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
    """Refuse a beta of the other scale.

    Raises:
        D3POError: log_probs are sums, and beta is one for means.
    """
    if config.log_prob == "sum" and config.beta > LARGEST_BETA:
        raise D3POError(
            f"train.beta is {config.beta:g} with train.log_prob 'sum'; expected at most {LARGEST_BETA:g}, since the "
            f"paper's is {PAPERS_BETA:g}: a beta for 'mean' is that times the number of latent elements. "
            "Leave train.beta out, or set train.log_prob to 'mean'"
        )


def drowned_share(gradients: Iterable[torch.Tensor | None], eps: float) -> float:
    """Share of the trained weights whose gradient is smaller than AdamW's eps, which then stops them.

    AdamW divides a gradient by its own size plus eps. A gradient that is 0 is left out, as those of a LoRA's first half
    are while its second half is 0: it moves nothing anyway.
    """
    there = [gradient for gradient in gradients if gradient is not None]
    if not there:
        return 0.0
    small = torch.stack([((gradient != 0) & (gradient.abs() < eps)).sum() for gradient in there])
    return int(small.sum()) / sum(gradient.numel() for gradient in there)


def drowned_warning(share: float | None, config: TrainConfig) -> str | None:
    """What to say of a round in which this share of the weights was stopped by eps; None when it is small."""
    if share is None or share <= DROWNED:
        return None
    return (
        f"{share:.0%} of the trained weights had gradients below train.adam_eps ({config.adam_eps:g}) and hardly "
        "moved; set train.adam_eps to 1e-15"
    )
