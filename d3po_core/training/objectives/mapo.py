"""MaPO: margin-aware preference optimisation without a reference (arXiv 2406.06424; mapo-t2i/mapo)."""

from typing import ClassVar

import torch
from pydantic import Field
from torch.nn.functional import logsigmoid

from d3po_core.config import TrainConfig
from d3po_core.training.objective import Losses, Objective, Reference, Rows

STEEPNESS = 0.5


class Mapo(Objective):
    """l_w - beta log sigmoid(T (f(l_w) - f(l_l))), f(l) = s l / (exp(s l) - 1), s = 1/2."""

    shares_noise: ClassVar[bool] = True
    reference: ClassVar[Reference] = "none"

    beta: float = Field(0.1, gt=0, description="Weight of the margin beside the winner's error")
    scale: float = Field(1000.0, gt=0, description="T, the factor of the margin; the authors' number of timesteps")

    def losses(self, rows: Rows, train: TrainConfig) -> Losses:
        """Return one loss per pair and step."""
        winner_P, loser_P = rows.error_R[rows.winner_P], rows.error_R[rows.loser_P]
        x_P = self.scale * (likelihood(winner_P) - likelihood(loser_P))
        loss_P = rows.weight_P * (winner_P - self.beta * logsigmoid(x_P))
        return Losses.plain(loss_P, -rows.error_R, (-x_P).sigmoid())


def likelihood(error: torch.Tensor) -> torch.Tensor:
    """Return f(l), falling from 1 at 0; expm1 and a floor keep 0/0 and the rounding of small errors out."""
    x = (STEEPNESS * error).clamp(min=1e-12)
    return x / torch.expm1(x)
