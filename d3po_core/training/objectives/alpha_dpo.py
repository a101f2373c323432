"""Alpha-DPO: an alpha-divergence in place of the logarithm (ICLR 2026; yangli-lab/Diffusion_alpha-DPO_ICLR2026)."""

import torch
from pydantic import Field, field_validator

from d3po_core.config import TrainConfig
from d3po_core.training.errors_of_pairs import Safeguarded
from d3po_core.training.objective import Losses, Rows


class AlphaDpo(Safeguarded):
    """(p^a - (1 - a) - a p) / (a (a - 1)), p = sigmoid(u); the authors multiply a by the update's mean p."""

    beta: float = Field(4000.0, gt=0, description="Inverse temperature of mean errors")
    alpha: float = Field(0.9999, gt=0, description="Order of the divergence; not 1, where the formula has no value")
    reweight: bool = Field(True, description="Multiply alpha by the mean p of the update, as in the authors' runs")

    @field_validator("alpha")
    @classmethod
    def _not_one(cls, alpha: float) -> float:
        if alpha == 1:
            raise ValueError("it must not be 1, where the formula has no value; 0.9999 is close to its limit")
        return alpha

    def needs_mean(self) -> bool:
        """Return whether alpha depends on the update."""
        return self.reweight

    def statistic(self, rows: Rows) -> torch.Tensor:
        """Return p of every pair."""
        return self.logit(rows).detach().sigmoid()

    def losses(self, rows: Rows, train: TrainConfig) -> Losses:
        """Return one loss per pair and step; in double, since near alpha 1 large terms cancel."""
        u_P = self.logit(rows).double()
        alpha = rows.update_mean.double() * self.alpha if self.reweight else torch.tensor(self.alpha).double()
        p_P = u_P.sigmoid()
        loss_P = (p_P**alpha - (1 - alpha) - alpha * p_P) / (alpha * (alpha - 1))
        return Losses.plain(rows.weight_P * loss_P.float(), -rows.rise_R, 1 - p_P.detach().float())
