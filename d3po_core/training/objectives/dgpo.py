"""DGPO: direct group preference optimisation (arXiv 2510.08425; X-GenGroup/Flow-Factory, dgpo.py)."""

from typing import ClassVar

from pydantic import Field

from d3po_core.config import TrainConfig
from d3po_core.training.objective import Labels, Losses, Objective, Rows, of_cell


class Dgpo(Objective):
    """w A l, w = sigmoid(sum over the group of A beta (l - lref) / K), without gradient, l the error of a draw."""

    labels: ClassVar[Labels] = "numbers"
    shares_noise: ClassVar[bool] = True

    beta: float = Field(1000.0, gt=0, description="Inverse temperature of mean errors")

    def losses(self, rows: Rows, train: TrainConfig) -> Losses:
        """Return one loss per image and step."""
        behind_R = self.beta * of_cell(rows.number_R * rows.rise_R.detach(), rows.cell_R)
        weight_R = behind_R.sigmoid()
        return Losses.plain(weight_R * rows.number_R * rows.error_R, -rows.rise_R, weight_R)
