"""DSPO: direct score preference optimisation (ICLR 2025; huaishengzhu/DSPO, its form for SD 1.5)."""

from pydantic import Field

from d3po_core.config import TrainConfig
from d3po_core.denoising.ddim import per_row
from d3po_core.training.errors_of_pairs import Safeguarded
from d3po_core.training.objective import Losses, Rows, squares


class Dspo(Safeguarded):
    """mean [(pred_w - target) - beta (1 - sigmoid(u)) (pred_w - ref_w)]^2; sigmoid(u) keeps its gradient."""

    beta: float = Field(0.001, gt=0, description="Weight of the preference's score, also within u, as in their code")

    def losses(self, rows: Rows, train: TrainConfig) -> Losses:
        """Return one loss per pair and step."""
        rest_P = 1 - self.logit(rows).sigmoid()
        output, target, reference = (
            x[rows.winner_P] for x in (rows.output_RCHW, rows.target_RCHW, rows.reference_RCHW)
        )
        loss_P = squares((output - target) - self.beta * per_row(rest_P, output) * (output - reference))
        return Losses.plain(rows.weight_P * loss_P, -rows.rise_R, rest_P.detach())
