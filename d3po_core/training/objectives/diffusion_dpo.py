"""Diffusion-DPO (arXiv 2311.12908, Eq. 14; SalesforceAIResearch/DiffusionDPO), with hinge and IPO."""

from typing import Literal

from pydantic import Field
from torch.nn.functional import logsigmoid

from d3po_core.config import TrainConfig
from d3po_core.training.errors_of_pairs import Safeguarded
from d3po_core.training.objective import Losses, Rows


class DiffusionDpo(Safeguarded):
    """-log sigmoid(u), u = -beta/2 ((l_w - l_l) - (lref_w - lref_l)), l the error of the conditional prediction."""

    beta: float = Field(
        5000.0, gt=0, description="Inverse temperature of mean errors; diffusers' beta_dpo is half of it"
    )
    loss: Literal["sigmoid", "hinge", "ipo"] = Field(
        "sigmoid", description="sigmoid: -log sigmoid(u); hinge: relu(1 - u); ipo: (u / beta - 1 / (2 beta))^2"
    )

    def losses(self, rows: Rows, train: TrainConfig) -> Losses:
        """Return one loss per pair and step."""
        u_P = self.logit(rows)
        if self.loss == "sigmoid":
            loss_P, factor_P = -logsigmoid(u_P), (-u_P).sigmoid()
        elif self.loss == "hinge":
            loss_P, factor_P = (1 - u_P).relu(), (u_P < 1).float()
        else:  # the margin, whatever beta is, is to be 1 / (2 beta)
            loss_P, factor_P = (u_P / self.beta - 1 / (2 * self.beta)) ** 2, (1 - 2 * u_P).abs().clamp(max=1)
        return Losses.plain(rows.weight_P * loss_P, -rows.rise_R, factor_P)
