"""Training objectives by their names in ``train.objective``.

An objective turns the log-ratios of a micro-batch's rows into one loss per pair. To add one, write a function and add a
line to ``OBJECTIVES``.
"""

from typing import Protocol

import torch

from d3po_core.config import TrainConfig
from d3po_core.errors import D3POError
from d3po_core.training.loss import PairLoss, pair_loss


class Objective(Protocol):
    """A loss over pairs: R rows (one image at one step), P pairs of rows."""

    def __call__(
        self,
        log_ratio_R: torch.Tensor,
        winner_P: torch.Tensor,
        loser_P: torch.Tensor,
        weight_P: torch.Tensor,
        config: TrainConfig,
    ) -> PairLoss:
        """Return the loss of every pair.

        Args:
            log_ratio_R: weighted log pi_theta - log pi_ref of each row.
            winner_P: row of each pair's winner.
            loser_P: row of each pair's loser, at the same step.
            weight_P: weight of each preference, in (0, 1].
            config: the round's learning settings.
        """
        ...


def d3po(
    log_ratio_R: torch.Tensor, winner_P: torch.Tensor, loser_P: torch.Tensor, weight_P: torch.Tensor,
    config: TrainConfig,
) -> PairLoss:  # fmt: skip
    """Return the loss of arXiv 2311.13231, Eq. 14."""
    return pair_loss(
        log_ratio_R, winner_P, loser_P, weight_P, beta=config.beta, clip=config.clip, clip_range=config.clip_range
    )


OBJECTIVES: dict[str, Objective] = {"d3po": d3po}


def check_objective(config: TrainConfig) -> None:
    """Check that the configured objective exists.

    Raises:
        D3POError: it does not; the message lists the known ones.
    """
    if config.objective not in OBJECTIVES:
        raise D3POError(f"train.objective is {config.objective!r}; expected one of {', '.join(OBJECTIVES)}")
