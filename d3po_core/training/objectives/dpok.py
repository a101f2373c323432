"""DPOK: policy gradient with a KL to the base model (arXiv 2305.16381; google-research/dpok, train_online_pg.py)."""

from typing import ClassVar

from pydantic import Field

from d3po_core.config import TrainConfig
from d3po_core.training.objective import Labels, Losses, Objective, Reference, Rows, Source, squares


class Dpok(Objective):
    """-w_r A clamp(rho) + w_kl mean (pred - pred_base)^2: the KL is to the base, and the group's mean is the value."""

    labels: ClassVar[Labels] = "numbers"
    source: ClassVar[Source] = "trajectory"
    guided: ClassVar[bool] = True
    reference: ClassVar[Reference] = "none"

    reward_weight: float = Field(100.0, gt=0, description="w_r, weight of the reward term")
    kl_weight: float = Field(
        0.01, ge=0, description="w_kl, weight of the squared difference from the base's prediction"
    )
    clip_range: float = Field(1e-4, gt=0, lt=1, description="Clamp the ratio of mean log_probs to 1 -/+ this")

    def needs_base(self) -> bool:
        """Return whether the KL term counts."""
        return self.kl_weight > 0

    def losses(self, rows: Rows, train: TrainConfig) -> Losses:
        """Return one loss per image and step."""
        log_ratio_R = rows.log_prob_R - rows.sampled_log_prob_R
        ratio_R = log_ratio_R.exp()
        clamped_R = ratio_R.clamp(1 - self.clip_range, 1 + self.clip_range)  # two-sided: no gradient outside
        loss_R = -self.reward_weight * rows.number_R * clamped_R
        if self.needs_base():
            loss_R = loss_R + self.kl_weight * squares(rows.output_RCHW - rows.base_RCHW)
        clipped_R = (clamped_R != ratio_R).float()
        return Losses(loss_R, log_ratio_R.detach(), 1 - clipped_R, clipped_R)
