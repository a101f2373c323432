"""Diffusion-KTO: good and bad images, no pairs (arXiv 2404.04465; jacklishufan/diffusion-kto)."""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch.nn.functional import logsigmoid

from d3po_core.config import TrainConfig
from d3po_core.training.objective import Labels, Losses, Objective, Rows


class Kto(Objective):
    """w (1 - U(s beta (g - z))), g = lref - l, s = 1 for good and -1 for bad, z = max(0, mean g of the update)."""

    labels: ClassVar[Labels] = "good_bad"

    beta: float = Field(1000.0, gt=0, description="Inverse temperature of mean errors")
    utility: Literal["sigmoid", "loss_averse"] = Field(
        "sigmoid", description="U: sigmoid, as in the paper, or log sigmoid, which never gives up on an image"
    )
    good_weight: float = Field(1.0, gt=0, description="Weight of good images")
    bad_weight: float = Field(1.0, gt=0, description="Weight of bad images")

    def needs_mean(self) -> bool:
        """Return that z is a mean over the update."""
        return True

    def statistic(self, rows: Rows) -> torch.Tensor:
        """Return g of every row: its mean is over the whole update, not over what fits the memory at once."""
        return -rows.rise_R.detach()

    def losses(self, rows: Rows, train: TrainConfig) -> Losses:
        """Return one loss per image and step."""
        sign_R = rows.number_R.sign()
        weight_R = torch.where(sign_R > 0, self.good_weight, self.bad_weight)
        x_R = sign_R * self.beta * (-rows.rise_R - rows.update_mean.clamp(min=0))
        utility_R = x_R.sigmoid() if self.utility == "sigmoid" else logsigmoid(x_R)
        return Losses.plain(weight_R * (1 - utility_R), -rows.rise_R, (-x_R).sigmoid())
