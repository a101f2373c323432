"""Reward-weighted regression: finetune on own images by softmax weights (arXiv 2305.13301, Eq. 4; jannerm/ddpo)."""

from typing import ClassVar

from pydantic import Field

from d3po_core.config import TrainConfig
from d3po_core.training.objective import Labels, Losses, Objective, Reference, Rows, of_cell


class Rwr(Objective):
    """w mean (target - guided prediction)^2, w = softmax of temperature x advantage in the group, times its size."""

    labels: ClassVar[Labels] = "numbers"
    guided: ClassVar[bool] = True
    reference: ClassVar[Reference] = "none"

    temperature: float = Field(
        1.0, gt=0, description="Multiplies the advantage before the softmax, as in the authors' code; larger is pickier"
    )

    def losses(self, rows: Rows, train: TrainConfig) -> Losses:
        """Return one loss per image and step; weights have mean 1 in a group."""
        weight_R = (self.temperature * rows.number_R).exp()
        weight_R = weight_R / of_cell(weight_R, rows.cell_R)
        return Losses.plain(weight_R * rows.error_R, -rows.error_R)
