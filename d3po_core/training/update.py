"""An update's metrics: sums over its micro-batches, and their means.

Tensor names carry their shape: T steps, R rows (one image at one step) of a micro-batch, P pairs.
"""

from dataclasses import dataclass
from typing import Any

import torch

from d3po_core.denoising.ddim import Schedule
from d3po_core.training.loss import PairLoss


@dataclass(frozen=True)
class Seen:
    """Means over pairs (loss, margin, pair_accuracy, clip_fraction) and over images (kl), for one policy.

    Attributes:
        loss: nats.
        margin: log-ratio to the reference of winners minus that of losers.
        pair_accuracy: share of pairs and steps with a margin above 0; a margin of exactly 0 counts half.
        kl: KL between the steps of the sampling policy and of this policy, nats per element and step.
        clip_fraction: share of the pairs' ratios that were clamped.
    """

    loss: float
    margin: float
    pair_accuracy: float
    kl: float
    clip_fraction: float


class UpdateTally:
    """Per-step sums over micro-batches, kept on the policy's device to avoid an early synchronisation."""

    def __init__(self, num_steps: int, num_pairs: int, device: torch.device) -> None:
        self.num_pairs = num_pairs
        self.sums_7T = torch.zeros(7, num_steps, device=device)
        self.pairs_T, self.rows_T, *sums = self.sums_7T.unbind(0)
        self.loss_T, self.margin_T, self.right_T, self.clipped_T, self.kl_T = sums

    def add(self, step_P: torch.Tensor, step_R: torch.Tensor, pairs: PairLoss, kl_R: torch.Tensor) -> None:
        """Add a micro-batch's pairs and rows."""
        loss_P = pairs.loss_P.detach()
        # A margin of exactly 0 (the first update of a round, on-policy) is neither right nor wrong.
        right_P = 0.5 * (1 + pairs.margin_P.sign())
        for total_T, value_P in (
            (self.pairs_T, torch.ones_like(loss_P)),
            (self.loss_T, loss_P),
            (self.margin_T, pairs.margin_P),
            (self.right_T, right_P),
            (self.clipped_T, pairs.clipped_P),
        ):
            total_T.index_add_(0, step_P, value_P.float())
        self.kl_T.index_add_(0, step_R, kl_R)
        self.rows_T.index_add_(0, step_R, torch.ones_like(kl_R))

    def seen(self) -> Seen:
        """Return the means over all steps."""
        pairs, rows = self.pairs_T.sum().item(), self.rows_T.sum().item()
        return Seen(
            loss=self.loss_T.sum().item() / pairs,
            margin=self.margin_T.sum().item() / pairs,
            pair_accuracy=self.right_T.sum().item() / pairs,
            kl=self.kl_T.sum().item() / rows,
            clip_fraction=self.clipped_T.sum().item() / pairs,
        )

    def per_step(self, update: int, schedule: Schedule) -> list[dict[str, Any]]:
        """Return the rows of ``update_steps``: one per step that had pairs."""
        pairs_T, margin_T, right_T, kl_T, rows_T, clipped_T = (
            sums_T.cpu()
            for sums_T in (self.pairs_T, self.margin_T, self.right_T, self.kl_T, self.rows_T, self.clipped_T)
        )
        timesteps = schedule.timesteps_T.round().long().tolist()
        return [
            {
                "update": update,
                "step": step,
                "timestep": timesteps[step],
                "margin_before": (margin_T[step] / pairs_T[step]).item(),
                "pair_accuracy_before": (right_T[step] / pairs_T[step]).item(),
                "kl_before": (kl_T[step] / rows_T[step]).item(),
                "clip_fraction": (clipped_T[step] / pairs_T[step]).item(),
            }
            for step in torch.nonzero(pairs_T).flatten().tolist()
        ]
