"""AWM: advantage-weighted matching (arXiv 2509.25050; scxue/advantage_weighted_matching)."""

from typing import ClassVar, Literal

import torch
from pydantic import Field

from d3po_core.config import TrainConfig
from d3po_core.training.objective import Labels, Losses, Objective, Reference, Rows, squares
from d3po_core.training.policy_gradient import clipped_gain

LARGEST = 5.0


class Awm(Objective):
    """max(-A rho, -A clip(rho)) + kl_weight (pred - base)^2, rho = exp(lp - lp_old), lp minus the error of a draw."""

    labels: ClassVar[Labels] = "numbers"
    reference: ClassVar[Reference] = "round_start"

    weighting: Literal["none", "t", "t2", "huber", "ghuber"] = Field(
        "ghuber", description="lp of the error e at noise share t: -e, -t e, -t^2 e, -t sqrt(e), or -t e^power / power"
    )
    power: float = Field(0.25, gt=0, le=1, description="Power of the error with weighting 'ghuber'")
    clip_range: float = Field(
        1.0, gt=0, le=1, description="Clip the ratio to 1 -/+ this; at 1 nothing is clipped below"
    )
    kl_weight: float = Field(
        0.003, ge=0, description="Weight of the squared difference from the base's prediction: it holds losers back"
    )

    def needs_base(self) -> bool:
        """Return whether the KL term counts."""
        return self.kl_weight > 0

    def losses(self, rows: Rows, train: TrainConfig) -> Losses:
        """Return one loss per image and step."""
        advantage_R = rows.number_R.clamp(-LARGEST, LARGEST) / LARGEST
        t_R = rows.noise_share_R
        log_ratio_R = self.log_prob(rows.error_R, t_R) - self.log_prob(rows.reference_error_R, t_R)
        loss_R, clipped_R = clipped_gain(log_ratio_R.exp(), advantage_R, self.clip_range)
        if self.needs_base():
            loss_R = loss_R + self.kl_weight * squares(rows.output_RCHW - rows.base_RCHW)
        return Losses(loss_R, -rows.rise_R.detach(), 1 - clipped_R, clipped_R)

    def log_prob(self, error_R: torch.Tensor, t_R: torch.Tensor) -> torch.Tensor:
        """Return what stands for a log_prob, from mean squared errors and shares of noise."""
        if self.weighting == "huber":
            return -((error_R + 1e-10).sqrt() - 1e-5) * t_R
        if self.weighting == "ghuber":
            return -((error_R + 1e-10) ** self.power - 1e-10**self.power) * t_R / self.power
        return -error_R * {"none": torch.ones_like(t_R), "t": t_R, "t2": t_R**2}[self.weighting]
