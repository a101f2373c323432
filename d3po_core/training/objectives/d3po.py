"""D3PO, the default: Eq. 14 of arXiv 2311.13231; its settings are fields of ``train`` (``beta``, ``clip``, ...)."""

from typing import ClassVar

import torch

from d3po_core.config import TrainConfig
from d3po_core.training.loss import pair_loss
from d3po_core.training.objective import Losses, Objective, Rows, Source


class D3po(Objective):
    """Raise a winner's steps over its loser's: -log sigmoid(beta (r_w - r_l)), r the log-ratio of a stored step."""

    source: ClassVar[Source] = "trajectory"
    guided: ClassVar[bool] = True

    def losses(self, rows: Rows, train: TrainConfig) -> Losses:
        """Return one loss per pair and step."""
        log_ratio_R = rows.step_weight_R * (rows.log_prob_R - rows.reference_log_prob_R)
        pairs = pair_loss(
            log_ratio_R, rows.winner_P, rows.loser_P, rows.weight_P, beta=train.beta, clip=train.clip,
            clip_range=train.clip_range,
        )  # fmt: skip
        factor_P = torch.sigmoid(-train.beta * pairs.margin_P)
        return Losses(pairs.loss_P, log_ratio_R.detach(), factor_P, pairs.clipped_P)
