"""DDPO: PPO's clipped ratio on every denoising step (arXiv 2305.13301, Eq. 5; kvablack/ddpo-pytorch)."""

from typing import ClassVar

from pydantic import Field

from d3po_core.config import TrainConfig
from d3po_core.training.objective import Labels, Losses, Objective, Reference, Rows, Source
from d3po_core.training.policy_gradient import clipped_gain


class Ddpo(Objective):
    """Make steps of images with a positive advantage likelier: max(-A rho, -A clip(rho)), rho against the sampler."""

    labels: ClassVar[Labels] = "numbers"
    source: ClassVar[Source] = "trajectory"
    guided: ClassVar[bool] = True
    reference: ClassVar[Reference] = "none"

    clip_range: float = Field(
        1e-4, gt=0, lt=1, description="Clip the ratio of mean log_probs to 1 -/+ this; a sum needs C*H*W times as much"
    )
    max_advantage: float = Field(5.0, gt=0, description="Largest size of an advantage")

    def losses(self, rows: Rows, train: TrainConfig) -> Losses:
        """Return one loss per image and step."""
        advantage_R = rows.number_R.clamp(-self.max_advantage, self.max_advantage)
        log_ratio_R = rows.log_prob_R - rows.sampled_log_prob_R
        loss_R, clipped_R = clipped_gain(log_ratio_R.exp(), advantage_R, self.clip_range)
        return Losses(loss_R, log_ratio_R.detach(), 1 - clipped_R, clipped_R)
