"""Fold an upsampling and its convolution into one transposed convolution: the same function, up to rounding.

A nearest-neighbour upsampling by two writes every pixel four times, and the 3x3 convolution after it multiplies all
four. Grouping the products by source pixel turns nine into four: 4/9 of the arithmetic, and the large image is never
written. Each weight is a sum of up to four original ones.

Tensor names carry their shape: B images, I input channels, O output channels, H W height, width.
"""

import torch
from diffusers.models.upsampling import Upsample2D
from torch.nn import functional

from d3po_core.speed.fused_layers import replace_modules


def fold_weight(weight_OI33: torch.Tensor) -> torch.Tensor:
    """Return the transposed convolution's weight ``[I, O, 4, 4]``, summed in single precision, then rounded.

    The upsampling is a transposed convolution with a 2x2 box of ones, so the two kernels are convolved with each other.
    """
    accurate_OI33 = weight_OI33.to(torch.promote_types(weight_OI33.dtype, torch.float32)).flip(2, 3)
    padded_OI55 = functional.pad(accurate_OI33, (1, 1, 1, 1))
    columns_OI54 = padded_OI55[..., :4] + padded_OI55[..., 1:]
    folded_OI44 = columns_OI54[..., :4, :] + columns_OI54[..., 1:, :]
    return folded_OI44.transpose(0, 1).to(weight_OI33.dtype).contiguous(memory_format=torch.channels_last)


class FoldedUpsample(torch.nn.Module):
    """Replaces diffusers' Upsample2D and keeps its frozen convolution."""

    folded_IO44: torch.Tensor

    def __init__(self, original: Upsample2D) -> None:
        super().__init__()
        self.conv = original.conv
        self.register_buffer("folded_IO44", fold_weight(self.conv.weight.data), persistent=False)

    def forward(self, x_BIHW: torch.Tensor, output_size: tuple[int, int] | None = None) -> torch.Tensor:
        """Map ``[B, I, H, W]`` to ``[B, O, 2H, 2W]``, or to ``output_size`` for sides that do not halve evenly."""
        if output_size is not None:
            # Contiguous, because interpolate's channels-last kernel fails on large batches (PyTorch issue 141831).
            return self.conv(functional.interpolate(x_BIHW.contiguous(), size=output_size, mode="nearest"))
        return functional.conv_transpose2d(x_BIHW, self.folded_IO44, self.conv.bias, stride=2, padding=1)


def fold_upsampling(network: torch.nn.Module) -> None:
    """Replace the upsamplings that have a plain frozen convolution."""
    replace_modules(network, Upsample2D, FoldedUpsample, _can_be_folded)


def _can_be_folded(upsample: Upsample2D) -> bool:
    conv = getattr(upsample, "conv", None)
    return (
        upsample.interpolate
        and upsample.norm is None
        and type(conv) is torch.nn.Conv2d
        and conv.kernel_size == (3, 3)
        and conv.padding == (1, 1)
        and conv.stride == (1, 1)
        and not conv.weight.requires_grad
    )
