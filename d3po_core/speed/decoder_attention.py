"""Compute a VAE decoder's attention as plain products: its one head is too wide for fast attention kernels."""

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor

WIDEST_FAST_HEAD = 256
"""Above this head size PyTorch falls back to a kernel that takes three times as long as two products and a softmax."""

MOST_SCORES = 2**12 * 2**12
"""Scores of an image that plain products may hold in memory; those of 64x64 latents."""


def attend_by_products(decoder: torch.nn.Module, positions: int) -> None:
    """Make the decoder's wide heads compute all scores at once, if ``positions`` is small enough."""
    if positions**2 > MOST_SCORES:
        return
    for module in decoder.modules():
        if isinstance(module, Attention) and module.inner_dim // module.heads > WIDEST_FAST_HEAD:
            module.set_processor(AttnProcessor())
