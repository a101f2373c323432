"""The D3PO loss over whole groups: one log_prob per image and step serves every pair.

    loss = - mean over pairs of  weight * log sigmoid( beta * (clip(r_w) - clip(r_l)) )
    r    = step_weight * (log pi_theta - log pi_ref)

Source: arXiv 2311.13231, Eq. 14, one term per pair and step. Three departures, each a setting: log_probs are means over
C, H, W unless ``log_prob: sum``; steps are weighted (``timestep_weighting``); the ratio is clamped (``clip``), as in
the published code but not in the paper.

Tensor names carry their shape: R rows (one image at one step), P pairs.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn.functional import logsigmoid

Clip = Literal["one_sided", "two_sided", "none"]


@dataclass(frozen=True)
class PairLoss:
    """Loss and metrics of each pair; every tensor is ``[P]``, and only loss_P has a gradient."""

    loss_P: torch.Tensor
    margin_P: torch.Tensor
    clipped_P: torch.Tensor


def pair_loss(
    log_ratio_R: torch.Tensor,
    winner_P: torch.Tensor,
    loser_P: torch.Tensor,
    weight_P: torch.Tensor,
    *,
    beta: float,
    clip: Clip,
    clip_range: float,
) -> PairLoss:
    """Return each pair's loss from the log-ratios of its two rows.

    Args:
        log_ratio_R: weighted log pi_theta - log pi_ref of each row.
        winner_P: row of each pair's winner.
        loser_P: row of each pair's loser, at the same step.
        weight_P: weight of each preference, in (0, 1].
        beta: inverse temperature, above 0.
        clip: ``two_sided`` clamps the ratio to 1 -/+ clip_range. ``one_sided`` clamps only a winner's rise and a
            loser's fall, so a move in the wrong direction always has a gradient. ``none`` clamps nothing.
        clip_range: half-width of the clamp, in (0, 1).

    Returns:
        loss (nats), unclipped margin r_w - r_l, and the clipped share (0, 0.5 or 1) of the pair's two ratios.
    """
    low, high = math.log1p(-clip_range), math.log1p(clip_range)
    r_w, r_l = log_ratio_R[winner_P], log_ratio_R[loser_P]
    margin_P = (r_w - r_l).detach()
    bounds_w = {"two_sided": (low, high), "one_sided": (None, high), "none": None}[clip]
    bounds_l = {"two_sided": (low, high), "one_sided": (low, None), "none": None}[clip]
    clipped_w = r_w if bounds_w is None else r_w.clamp(*bounds_w)
    clipped_l = r_l if bounds_l is None else r_l.clamp(*bounds_l)
    loss_P = -weight_P * logsigmoid(beta * (clipped_w - clipped_l))
    clipped_P = ((clipped_w != r_w).float() + (clipped_l != r_l).float()) / 2
    return PairLoss(loss_P, margin_P, clipped_P.detach())
