"""DMPO: the divergence of sigmoid(u) from a soft label (AIDC-AI/Diffusion-SDPO, train_method dmpo)."""

import math

from pydantic import Field
from torch.nn.functional import logsigmoid

from d3po_core.config import TrainConfig
from d3po_core.training.errors_of_pairs import Safeguarded
from d3po_core.training.objective import Losses, Rows


class Dmpo(Safeguarded):
    """KL(Bernoulli(sigmoid(u)) || Bernoulli(1 - alpha)): a pair that is right enough pulls no further."""

    beta: float = Field(2000.0, gt=0, description="Inverse temperature of mean errors")
    alpha: float = Field(0.01, gt=1e-6, lt=0.5, description="Assumed share of wrong labels")

    def losses(self, rows: Rows, train: TrainConfig) -> Losses:
        """Return one loss per pair and step."""
        u_P = self.logit(rows)
        p_P = u_P.sigmoid()
        right_P = p_P * (logsigmoid(u_P) - math.log1p(-self.alpha))
        wrong_P = (1 - p_P) * (logsigmoid(-u_P) - math.log(self.alpha))
        return Losses.plain(rows.weight_P * (right_P + wrong_P), -rows.rise_R, (1 - p_P).detach())
