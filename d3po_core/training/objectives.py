"""The objectives that a round can be trained with, by their names in ``train.objective``.

An objective turns the log-ratios of a micro-batch's rows into a loss of each pair. Another one is another function and
a line in ``OBJECTIVES``.
"""

from typing import Protocol

import torch

from d3po_core.config import TrainConfig
from d3po_core.errors import D3POError
from d3po_core.training.loss import PairLoss, pair_loss


class Objective(Protocol):
    """A loss of pairs: R rows (an image at a step), P pairs of rows."""

    def __call__(
        self,
        log_ratio_R: torch.Tensor,
        winner_P: torch.Tensor,
        loser_P: torch.Tensor,
        weight_P: torch.Tensor,
        config: TrainConfig,
    ) -> PairLoss:
        """The loss of every pair.

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
    """The loss of arXiv 2311.13231, Eq. 14."""
    return pair_loss(
        log_ratio_R, winner_P, loser_P, weight_P, beta=config.beta, clip=config.clip, clip_range=config.clip_range
    )


OBJECTIVES: dict[str, Objective] = {"d3po": d3po}


def check_objective(config: TrainConfig) -> None:
    """Make sure that the objective is one.

    Raises:
        D3POError: it is not; names those that are.
    """
    if config.objective not in OBJECTIVES:
        raise D3POError(f"train.objective is {config.objective!r}; expected one of {', '.join(OBJECTIVES)}")
