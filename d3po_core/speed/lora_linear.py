"""A frozen linear layer and its LoRA as one operator; its backward pass makes no gradient for frozen weights.

Otherwise a LoRA of rank 4 takes almost as much time as the layer itself, because its thin products pass over as much
memory. On a recent GPU one kernel does it all (lora_kernel.py). Elsewhere the LoRA's part is written first, and the
layer's product accumulates on it, in single precision before rounding.

Tensor names carry their shape: M rows (images x tokens), K inputs, N outputs, R ranks.
"""

from types import ModuleType

import torch

_lora_kernel: ModuleType | None
try:
    from d3po_core.speed import lora_kernel as _lora_kernel
except ImportError:  # no Triton: only PyTorch's GPU builds on Linux include it
    _lora_kernel = None

FEWEST_BACKWARD_ROWS = 1 << 16
"""With so many the kernel's backward pass is faster: on an H200 1.19 ms against 1.21 (524,288 rows, 320 to 960
channels) and 0.55 against 0.69 (320 to 320), but 0.72 against 0.62 with 32,768 rows of 1,280 to 3,840."""

WIDEST_POWER = 64
"""Up to here ranks are padded to a power of two, which the kernel needs; beyond, to whole 16 bytes."""


def padded_rank(rank: int) -> int:
    """Return the width to which a LoRA's thin products are zero-padded for fast kernels."""
    return max(16, 1 << (rank - 1).bit_length()) if rank <= WIDEST_POWER else rank + -rank % 8


@torch.library.custom_op("d3po::lora_linear", mutates_args=())
def lora_linear(
    x_MK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None, down_RK: torch.Tensor, up_NR: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``x W^T + b + (x A^T) B^T`` and ``x A^T``, all of one dtype; gradients reach x, A and B.

    Args:
        x_MK: input rows.
        weight_NK: frozen weight W.
        bias_N: frozen bias b.
        down_RK: A, stacked over the fused layers.
        up_NR: B, block-diagonal over the fused layers, scale included.
    """
    if _lora_kernel is not None and _lora_kernel.can_compute(x_MK, up_NR):
        return _lora_kernel.lora_forward(x_MK, weight_NK, bias_N, down_RK, up_NR)
    low_MR = x_MK @ down_RK.T
    out_MN = low_MR @ up_NR.T if bias_N is None else torch.addmm(bias_N, low_MR, up_NR.T)
    return out_MN.addmm_(x_MK, weight_NK.T), low_MR


@lora_linear.register_fake
def _(x_MK, weight_NK, bias_N, down_RK, up_NR):  # type: ignore[no-untyped-def]
    return x_MK.new_empty(len(x_MK), len(weight_NK)), x_MK.new_empty(len(x_MK), len(down_RK))


@torch.library.custom_op("d3po::lora_linear_backward", mutates_args=())
def _backward_op(
    grad_MN: torch.Tensor, x_MK: torch.Tensor, low_MR: torch.Tensor, weight_NK: torch.Tensor, down_RK: torch.Tensor,
    up_NR: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    long = len(grad_MN) >= FEWEST_BACKWARD_ROWS
    if long and _lora_kernel is not None and _lora_kernel.can_compute(grad_MN, down_RK.T):
        # The gradient of x is again a layer with a LoRA, with transposed matrices.
        grad_x_MK, grad_low_MR = _lora_kernel.lora_forward(grad_MN, weight_NK.T, None, up_NR.T, down_RK.T)
    else:
        grad_low_MR = grad_MN @ up_NR
        grad_x_MK = (grad_low_MR @ down_RK).addmm_(grad_MN, weight_NK)
    return grad_x_MK, grad_low_MR.T @ x_MK, grad_MN.T @ low_MR


@_backward_op.register_fake
def _(grad_MN, x_MK, low_MR, weight_NK, down_RK, up_NR):  # type: ignore[no-untyped-def]
    return torch.empty_like(x_MK), torch.empty_like(down_RK), torch.empty_like(up_NR)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x_MK, weight_NK, _, down_RK, up_NR = inputs
    ctx.save_for_backward(x_MK, output[1], weight_NK, down_RK, up_NR)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_MN, _):  # type: ignore[no-untyped-def]
    x_MK, low_MR, weight_NK, down_RK, up_NR = ctx.saved_tensors
    grad_x, grad_down, grad_up = _backward_op(grad_MN.contiguous(), x_MK, low_MR, weight_NK, down_RK, up_NR)
    return grad_x, None, None, grad_down, grad_up


lora_linear.register_autograd(_backward, setup_context=_setup_context)
