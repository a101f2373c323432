"""The quantity that most objectives on pairs of final images share, and the safeguard of the winner.

    u = -beta/2 ((l_w - l_l) - (lref_w - lref_l))

Sources: Diffusion-DPO, arXiv 2311.12908, Eq. 14; Diffusion-SDPO, arXiv 2511.03317, for the safeguard. Their factor is
one number per batch; ours is one per pair, so that it does not depend on how pairs are batched.
"""

from typing import ClassVar

import torch
from pydantic import Field

from d3po_core.training.objective import Objective, Rows


class Safeguarded(Objective):
    """An objective of u, whose losers' gradient can be scaled so that it does not raise the winner's error."""

    shares_noise: ClassVar[bool] = True

    beta: float
    safeguard: bool = Field(False, description="Scale the loser's gradient so that the winner's error cannot grow")
    safeguard_mu: float = Field(0.9, ge=0, le=1, description="How much of the winner's progress the safeguard keeps")

    def logit(self, rows: Rows) -> torch.Tensor:
        """Return u of every pair; the safeguard changes its gradient, not its value."""
        rise_w, rise_l = rows.rise_R[rows.winner_P], rows.rise_R[rows.loser_P]
        if self.safeguard:
            scale_P = loser_scale(rows, self.safeguard_mu)
            rise_l = rise_l.detach() + scale_P * (rise_l - rise_l.detach())
        return -0.5 * self.beta * (rise_w - rise_l)


def loser_scale(rows: Rows, mu: float) -> torch.Tensor:
    """Return clamp((1 - mu) |g_w|^2 / (g_w . g_l), 0, 1) of each pair, 1 if its gradients do not pull together."""
    gradient_RCHW = (rows.output_RCHW - rows.target_RCHW).detach()  # of the error, up to a common factor
    g_w, g_l = (gradient_RCHW[side].flatten(1) for side in (rows.winner_P, rows.loser_P))
    common_P = (g_w * g_l).sum(1)
    bound_P = (1 - mu) * (g_w**2).sum(1) / common_P.clamp(min=1e-9)
    return torch.where(common_P > 0, bound_P.clamp(0, 1), 1.0)
