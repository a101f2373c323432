"""DiffusionNFT: a positive and a negative policy on both sides of the sampler (arXiv 2509.16117; NVlabs)."""

from typing import ClassVar

import torch
from pydantic import Field

from d3po_core.config import TrainConfig
from d3po_core.denoising.ddim import per_row
from d3po_core.training.objective import Labels, Losses, Objective, Reference, Rows, squares


class Nft(Objective):
    """r L+ / beta + (1 - r) L- / beta: L+ of old + beta (pred - old), L- of old - beta (pred - old), r in [0, 1]."""

    labels: ClassVar[Labels] = "numbers"
    reference: ClassVar[Reference] = "round_start"

    beta: float = Field(1.0, gt=0, le=1, description="How far the two policies lie from the sampler's")
    good_or_bad: bool = Field(False, description="Take good and bad images, as r = 1 and 0, in place of advantages")
    kl_weight: float = Field(1e-4, ge=0, description="Weight of the squared difference from the base's prediction")
    scale: float = Field(5.0, gt=0, description="Factor of the loss: the largest size of an advantage")

    def takes(self) -> Labels:
        """Return the labels that it learns from."""
        return "good_bad" if self.good_or_bad else "numbers"

    def needs_base(self) -> bool:
        """Return whether the KL term counts."""
        return self.kl_weight > 0

    def losses(self, rows: Rows, train: TrainConfig) -> Losses:
        """Return one loss per image and step.

        At the sampler and beta 1 its value does not depend on r, only its gradient does.
        """
        limited_R = rows.number_R.clamp(-self.scale, self.scale) / (2 * self.scale) + 0.5
        r_R = (rows.number_R > 0).float() if self.good_or_bad else limited_R.clamp(0, 1)
        step = self.beta * (rows.output_RCHW - rows.reference_RCHW)
        toward_R, away_R = (
            self._matched(rows, rows.reference_RCHW + sign * step - rows.target_RCHW) for sign in (1, -1)
        )
        loss_R = self.scale * (r_R * toward_R + (1 - r_R) * away_R) / self.beta
        if self.needs_base():
            loss_R = loss_R + self.kl_weight * squares(rows.output_RCHW - rows.base_RCHW)
        return Losses.plain(loss_R, -rows.rise_R)

    @staticmethod
    def _matched(rows: Rows, missed_RCHW: torch.Tensor) -> torch.Tensor:
        """Return the squared error of x_0 over its mean absolute error, which carries no gradient."""
        of_x0 = per_row(rows.x0_scale_R, missed_RCHW) * missed_RCHW
        size_R = of_x0.detach().double().abs().flatten(1).mean(dim=1).clamp(min=1e-5)
        return squares(of_x0) / size_R.float()
