"""Flow-GRPO with group advantages, a KL to the base and GRPO-Guard's ratio (arXiv 2505.05470, 2510.22319)."""

from typing import ClassVar

from pydantic import Field

from d3po_core.config import TrainConfig
from d3po_core.training.objective import Labels, Losses, Objective, Reference, Rows, Source, squares
from d3po_core.training.policy_gradient import clipped_gain


class Grpo(Objective):
    """max(-A rho, -A clip(rho)) + kl_weight KL(step, base's step); A is normalised within the group."""

    labels: ClassVar[Labels] = "numbers"
    source: ClassVar[Source] = "trajectory"
    guided: ClassVar[bool] = True
    reference: ClassVar[Reference] = "none"

    clip_range: float = Field(1e-4, gt=0, lt=1, description="Clip the ratio to 1 -/+ this")
    kl_weight: float = Field(0.0, ge=0, description="Weight of the step's exact KL to the base's step, per element")
    guard: bool = Field(
        False, description="Scale each step's log-ratio by its sigma and take off its mean, so that clipping is fair"
    )
    max_advantage: float = Field(5.0, gt=0, description="Largest size of an advantage")

    def needs_base(self) -> bool:
        """Return whether the KL term counts."""
        return self.kl_weight > 0

    def losses(self, rows: Rows, train: TrainConfig) -> Losses:
        """Return one loss per image and step."""
        advantage_R = rows.number_R.clamp(-self.max_advantage, self.max_advantage)
        log_ratio_R = rows.log_prob_R - rows.sampled_log_prob_R
        exponent_R = log_ratio_R
        if self.guard:
            moved_R = squares(rows.mean_RCHW - rows.sampled_mean_RCHW)
            exponent_R = log_ratio_R * rows.sigma_R + moved_R / (2 * rows.sigma_R)
        loss_R, clipped_R = clipped_gain(exponent_R.exp(), advantage_R, self.clip_range)
        if self.needs_base():
            loss_R = loss_R + self.kl_weight * rows.kl_scale_R * squares(rows.output_RCHW - rows.base_RCHW)
        return Losses(loss_R, log_ratio_R.detach(), 1 - clipped_R, clipped_R)
