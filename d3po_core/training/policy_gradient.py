"""PPO's clipped gain, shared by the objectives that learn from advantages."""

import torch


def clipped_gain(
    ratio_R: torch.Tensor, advantage_R: torch.Tensor, clip_range: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return max(-A rho, -A clip(rho)) of each row, and 1 where the clip stops its gradient, else 0.

    Source: PPO, arXiv 1707.06347, Eq. 7. A move in the wrong direction always keeps its gradient.
    """
    clamped_R = ratio_R.clamp(1 - clip_range, 1 + clip_range)
    free_R, held_R = -advantage_R * ratio_R, -advantage_R * clamped_R
    return torch.maximum(free_R, held_R), (held_R > free_R).float()
