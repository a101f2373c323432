"""An update's metrics: sums over its micro-batches, and their means.

Tensor names carry their shape: T steps, R rows (one image at one step) of a micro-batch, P pairs, U units of the loss.
"""

from dataclasses import dataclass
from typing import Any

import torch

from d3po_core.denoising.ddim import Schedule
from d3po_core.training.objective import Losses, Rows


@dataclass(frozen=True)
class Seen:
    """Means over pairs, over images (kl) or over the loss's units, for one policy; None without pairs or a known KL.

    Attributes:
        loss: of the units; nats for logistic losses.
        margin: reward of winners minus that of losers. On stored steps a reward is the log-ratio to the reference, on
            final images how far the error fell below the reference's (below 0 if the objective has no reference).
        pair_accuracy: share of pairs and steps with a margin above 0; a margin of exactly 0 counts half.
        winner_error: minus the reward of winners: the rise of their error.
        loser_error: the same of losers; if both rise, the policy leaves both (likelihood displacement).
        neutral_error: the rise of either error by a move as far in a random direction: the KL, with the steps' weights.
        kl: KL between the steps of the sampling policy and of this policy, nats per element and step.
        clip_fraction: share of ratios that were clamped.
        gradient_factor: mean share of the gradient at work; sigmoid(-u) for logistic losses, 1/2 at their start.
    """

    loss: float
    margin: float | None
    pair_accuracy: float | None
    winner_error: float | None
    loser_error: float | None
    neutral_error: float | None
    kl: float | None
    clip_fraction: float
    gradient_factor: float


OF_UNITS = ("loss", "clip_fraction", "gradient_factor")
OF_PAIRS = ("margin", "pair_accuracy", "winner_error", "loser_error")
NAMES = (*OF_UNITS, *OF_PAIRS, "neutral_error", "kl", "units", "pairs", "rows")
COUNTS = {**dict.fromkeys(OF_UNITS, "units"), **dict.fromkeys(OF_PAIRS, "pairs"), "neutral_error": "rows", "kl": "rows"}


class UpdateTally:
    """Per-step sums over micro-batches, kept on the policy's device to avoid an early synchronisation."""

    def __init__(self, num_steps: int, num_units: int, device: torch.device, of_pairs: bool = True) -> None:
        self.num_units, self.of_pairs = num_units, of_pairs
        self.sums_KT = torch.zeros(len(NAMES), num_steps, device=device)
        self.sum_T = dict(zip(NAMES, self.sums_KT.unbind(0), strict=True))

    def add(self, rows: Rows, losses: Losses) -> None:
        """Add a micro-batch's units, pairs and rows."""
        loss_U = losses.loss_U.detach()
        winner_P, loser_P = losses.reward_R[rows.winner_P], losses.reward_R[rows.loser_P]
        margin_P = winner_P - loser_P
        step_U = rows.step_P if self.of_pairs else rows.step_R
        self._add(step_U, units=torch.ones_like(loss_U), loss=loss_U, clip_fraction=losses.clipped_U,
                  gradient_factor=losses.factor_U)  # fmt: skip
        # A margin of exactly 0 (the first update of a round, on-policy) is neither right nor wrong.
        self._add(rows.step_P, pairs=torch.ones_like(margin_P), margin=margin_P, winner_error=-winner_P,
                  loser_error=-loser_P, pair_accuracy=0.5 * (1 + margin_P.sign()))  # fmt: skip
        if len(rows.kl_R):
            self._add(rows.step_R, rows=torch.ones_like(rows.kl_R), kl=rows.kl_R)
        if len(rows.step_weight_R):
            self._add(rows.step_R, neutral_error=rows.step_weight_R * rows.kl_R)

    def _add(self, step: torch.Tensor, **values: torch.Tensor) -> None:
        for name, value in values.items():
            self.sum_T[name].index_add_(0, step, value.float())

    def _means(self, sums: dict[str, float]) -> dict[str, float | None]:
        return {name: sums[name] / sums[count] if sums[count] else None for name, count in COUNTS.items()}

    def seen(self) -> Seen:
        """Return the means over all steps."""
        means = self._means({name: sum_T.sum().item() for name, sum_T in self.sum_T.items()})
        return Seen(**means)  # type: ignore[arg-type]  # an update always has units

    def per_step(self, update: int, schedule: Schedule) -> list[dict[str, Any]]:
        """Return the rows of ``update_steps``: one per step that had units."""
        sums = {name: sum_T.tolist() for name, sum_T in self.sum_T.items()}
        timesteps = schedule.timesteps_T.round().long().tolist()
        rows = []
        for step in (step for step, units in enumerate(sums["units"]) if units):
            means = self._means({name: values[step] for name, values in sums.items()})
            before = {f"{name}_before": means[name] for name in (*OF_PAIRS, "kl")}
            rest = {name: means[name] for name in ("clip_fraction", "gradient_factor")}
            rows.append({"update": update, "step": step, "timestep": timesteps[step], **before, **rest})
        return rows
