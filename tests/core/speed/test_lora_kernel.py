"""The GPU kernel of a layer with its LoRA, run by Triton's interpreter: what it computes, not how fast."""

import subprocess
import sys
from typing import ClassVar

import pytest
import torch

from d3po_core.speed import lora_linear

pytest.importorskip(
    "triton", reason="PyTorch's GPU kernels are compiled by Triton, which is there on x86-64 Linux only"
)

PROGRAM = """
import itertools, sys
import torch
from d3po_core.speed.lora_kernel import lora_forward

# Whole blocks; rows, inputs and outputs that end within one; more ranks than inputs. Not bfloat16, whose products the
# interpreter gets wrong: tests/benchmarks/gpu.py, part equality, compares it on a GPU.
shapes = [(256, 128, 128, 16), (200, 96, 72, 16), (5, 136, 264, 64), (300, 8, 8, 32)]
for (rows, inputs, outputs, ranks), has_bias in itertools.product(shapes, (True, False)):
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, inputs).half(), torch.randn(outputs, inputs).half()
    down, up = torch.randn(ranks, inputs).half(), (torch.randn(outputs, ranks) / 8).half()
    bias = torch.randn(outputs).half() if has_bias else None
    found, low = lora_forward(x, weight, bias, down, up)
    low_expected = x.double() @ down.double().T
    expected = x.double() @ weight.double().T + low.double() @ up.double().T
    if bias is not None:
        expected += bias.double()
    # Single precision sums, rounded once at the end.
    epsilon = torch.finfo(torch.float16).eps
    torch.testing.assert_close(low.double(), low_expected, rtol=epsilon, atol=1e-4)
    torch.testing.assert_close(found.double(), expected, rtol=epsilon, atol=1e-4)
print("equal")
"""


def test_kernel_is_the_layer_with_its_lora() -> None:
    """In a process of its own: how Triton runs is settled when it is imported."""
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={"TRITON_INTERPRET": "1", "PATH": ""}, capture_output=True, text=True
    )
    assert (run.returncode, run.stdout.strip()) == (0, "equal"), run.stderr


class Kernel:
    """The kernel's contract, by plain products."""

    asked: ClassVar[list[tuple[int, ...]]] = []
    calls: ClassVar[list[int]] = []

    @classmethod
    def can_compute(cls, x_MK: torch.Tensor, up_NR: torch.Tensor) -> bool:
        cls.asked.append((*x_MK.shape, *up_NR.shape))
        return len(x_MK) > 4

    @classmethod
    def lora_forward(
        cls, x_MK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None, down_RK: torch.Tensor,
        up_NR: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        cls.calls.append(len(x_MK))
        low_MR = x_MK @ down_RK.T
        return x_MK @ weight_NK.T + low_MR @ up_NR.T + (0 if bias_N is None else bias_N), low_MR


@pytest.mark.parametrize("rows", [5, 4])
def test_the_operator_leaves_to_the_kernel_what_it_can_compute(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both passes, and both ways give the gradients of the plain formula."""
    monkeypatch.setattr(lora_linear, "_lora_kernel", Kernel)
    monkeypatch.setattr(lora_linear, "FEWEST_BACKWARD_ROWS", 5)
    monkeypatch.setattr(Kernel, "asked", [])
    monkeypatch.setattr(Kernel, "calls", [])
    weight, bias = torch.randn(24, 8), torch.randn(24)
    x, down, up, grad = torch.randn(rows, 8), torch.randn(16, 8), torch.randn(24, 16), torch.randn(rows, 24)
    gradients = []
    for layer in (
        lambda x, down, up: lora_linear.lora_linear(x, weight, bias, down, up)[0],
        lambda x, down, up: x @ weight.T + bias + x @ down.T @ up.T,
    ):
        inputs = [tensor.clone().requires_grad_() for tensor in (x, down, up)]
        out_MN = layer(*inputs)
        gradients.append((out_MN.detach(), *torch.autograd.grad(out_MN, inputs, grad)))
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    # Of too few rows the kernel is not even asked for the backward pass.
    passes = 2 if rows > 4 else 1
    assert Kernel.asked == [(rows, 8, 24, 16), (rows, 24, 8, 16)][:passes]
    assert Kernel.calls == ([rows, rows] if rows > 4 else [])


def test_on_a_processor_the_kernel_stands_back() -> None:
    from d3po_core.speed.lora_kernel import can_compute

    assert not can_compute(torch.zeros(16, 8).half(), torch.zeros(8, 16).half())
