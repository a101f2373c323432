"""A linear layer and its LoRA in one GPU kernel (Triton): the input is read once and the output written once.

As separate products, a LoRA of rank 4 passes three times over memory that the layer itself passes over once. On an
H100, the three projections of an attention over 4,096 positions, 128 images, take 1.6 ms instead of 0.9 ms.

Tensor names carry their shape: M rows, K inputs, N outputs, R ranks.
"""

import functools

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

BLOCK_M, BLOCK_N, BLOCK_K = 128, 128, 64
WARPS, STAGES = 4, 3
MOST_RANKS = 64
"""Wider LoRAs do not leave enough registers for their part of a block."""

OLDEST = (9, 0)
"""Hopper: older GPUs cannot copy blocks of memory by themselves, and were not measured."""


@functools.cache
def _is_new_enough(index: int) -> bool:
    return torch.cuda.get_device_capability(index) >= OLDEST


def can_compute(x_MK: torch.Tensor, up_NR: torch.Tensor) -> bool:
    """Return whether the kernel supports these: a recent NVIDIA GPU, half precision, rows aligned to 16 bytes."""
    return (
        x_MK.device.type == "cuda"
        and torch.version.hip is None
        and _is_new_enough(x_MK.device.index)
        and x_MK.dtype.itemsize == 2
        and len(x_MK) > 0
        and x_MK.shape[1] % 8 == up_NR.shape[0] % 8 == 0
        and 16 <= up_NR.shape[1] <= MOST_RANKS
    )


def lora_forward(
    x_MK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None, down_RK: torch.Tensor, up_NR: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``x W^T + b + (x A^T) B^T`` and ``x A^T``, summed in single precision; R is a power of two >= 16."""
    (rows, inputs), outputs, ranks = x_MK.shape, len(weight_NK), len(down_RK)
    out_MN, low_MR = x_MK.new_empty(rows, outputs), x_MK.new_empty(rows, ranks)
    blocks = (
        (x_MK, BLOCK_M, BLOCK_K), (weight_NK, BLOCK_N, BLOCK_K), (down_RK, ranks, BLOCK_K), (up_NR, BLOCK_N, ranks),
        (out_MN, BLOCK_M, BLOCK_N), (low_MR, BLOCK_M, ranks),
    )  # fmt: skip
    descriptors = [TensorDescriptor.from_tensor(tensor.contiguous(), list(block)) for tensor, *block in blocks]
    grid = (triton.cdiv(rows, BLOCK_M) * triton.cdiv(outputs, BLOCK_N),)
    _lora_forward[grid](
        *descriptors, x_MK if bias_N is None else bias_N, outputs, inputs, ranks, bias_N is not None,
        BLOCK_M, BLOCK_N, BLOCK_K, num_warps=WARPS, num_stages=STAGES,
    )  # fmt: skip
    return out_MN, low_MR


@triton.jit
def _lora_forward(  # type: ignore[no-untyped-def]
    x_MK, weight_NK, down_RK, up_NR, out_MN, low_MR, bias_N,
    N: tl.constexpr, K: tl.constexpr, R: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Blocks beside each other share their rows of x. What lies outside a tensor is read as 0 and not written.
    blocks_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    first_m = tl.program_id(0) // blocks_n * BLOCK_M
    first_n = tl.program_id(0) % blocks_n * BLOCK_N
    sum_MN = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    low_sum_MR = tl.zeros((BLOCK_M, R), tl.float32)
    for k in range(0, K, BLOCK_K):
        block_MK = x_MK.load([first_m, k])
        sum_MN = tl.dot(block_MK, weight_NK.load([first_n, k]).T, sum_MN)
        low_sum_MR = tl.dot(block_MK, down_RK.load([0, k]).T, low_sum_MR)
    rounded_MR = low_sum_MR.to(low_MR.dtype)
    sum_MN = tl.dot(rounded_MR, up_NR.load([first_n, 0]).T, sum_MN)
    if HAS_BIAS:
        n = first_n + tl.arange(0, BLOCK_N)
        sum_MN += tl.load(bias_N + n, mask=n < N, other=0.0)[None, :].to(tl.float32)
    out_MN.store([first_m, first_n], sum_MN.to(out_MN.dtype))
    if first_n == 0:
        low_MR.store([first_m, 0], rounded_MR)
