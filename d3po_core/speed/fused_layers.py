"""Run a UNet's transformer blocks in fewer memory passes; values and gradients are the same up to rounding.

The three projections of a self-attention become one product with one LoRA (lora_linear.py).

A group norm becomes one scale and one shift per channel, which compiled code applies in half the time.

While a batch is sampled, LoRA and text stay the same, so everything that depends only on them is computed once.

The two halves of a gated layer (GEGLU) are separate products. The gradients of one shared product's halves would have
to be joined first, and compiled code does that by computing both for every element.

Tensor names carry their shape: B images, L tokens, K inputs, N outputs, R ranks; M rows (images x tokens).
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.activations import GEGLU
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from peft.tuners.lora import Linear
from torch.nn import functional

from d3po_core.speed.lora_linear import lora_linear, padded_rank

Original = TypeVar("Original", bound=torch.nn.Module)


class FusedLoRA:
    """Linear layers with a LoRA and a common input, computed as one.

    Their frozen weights become views of one matrix, so that nothing is stored twice.
    """

    def __init__(self, layers: list[Linear]) -> None:
        self.layers = layers
        bases = [layer.get_base_layer() for layer in layers]
        self.weight_NK = torch.cat([base.weight.data for base in bases])
        self.sizes = [base.weight.shape[0] for base in bases]
        for base, rows in zip(bases, self.weight_NK.split(self.sizes), strict=True):
            base.weight.data = rows
        # The result of ``_low_rank`` while the weights do not change.
        self.held: tuple[torch.Tensor, torch.Tensor] | None = None
        biases = [base.bias for base in bases]
        assert len(biases) == 1 or not any(b is not None for b in biases), "fused projections have no bias"
        self.bias_N = biases[0]

    def __call__(self, x_BLK: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the layers' outputs, each ``[B, L, N]``."""
        dtype = self.weight_NK.dtype
        x_MK = x_BLK.reshape(-1, x_BLK.shape[-1]).to(dtype)
        if self.layers[0].disable_adapters:
            out_MN = functional.linear(x_MK, self.weight_NK, self.bias_N)
        else:
            low_rank = self._low_rank(dtype) if self.held is None else self.held
            out_MN, _ = lora_linear(x_MK, self.weight_NK, self.bias_N, *low_rank)
        return out_MN.view(*x_BLK.shape[:-1], -1).split(self.sizes, dim=-1)

    def hold(self) -> None:
        """Compute A and B once for all following calls."""
        self.held = self._low_rank(self.weight_NK.dtype)

    def _low_rank(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A stacked ``[R, K]`` and scaled B block-diagonal ``[N, R]``, with R padded with zeros."""
        down_RK = torch.cat([layer.lora_A["default"].weight for layer in self.layers])
        scaled = [layer.lora_B["default"].weight * layer.scaling["default"] for layer in self.layers]
        up_NR = torch.block_diag(*scaled)
        missing = padded_rank(len(down_RK)) - len(down_RK)
        return functional.pad(down_RK, (0, 0, 0, missing)).to(dtype), functional.pad(up_NR, (0, missing)).to(dtype)


class SharedRows:
    """Compute rows once while guidance's two copies, one per text, are still equal."""

    def __init__(self) -> None:
        self.come_twice = False

    def once(self, x_B: torch.Tensor) -> torch.Tensor:
        """Return the first half of the rows if they come twice, else all."""
        return x_B[: len(x_B) // 2] if self.come_twice else x_B

    def twice(self, x_B: torch.Tensor) -> torch.Tensor:
        """Undo ``once``: repeat the rows if they came twice."""
        return torch.cat([x_B, x_B]) if self.come_twice else x_B


class FusedAttention:
    """A diffusers attention processor for a UNet's transformer blocks."""

    def __init__(self, attention: Attention, *, reads_text: bool) -> None:
        self.shared = SharedRows()
        out = attention.to_out[0]
        if reads_text:
            self.query, self.key_value = FusedLoRA([attention.to_q]), FusedLoRA([attention.to_k, attention.to_v])
        else:
            self.query_key_value = FusedLoRA([attention.to_q, attention.to_k, attention.to_v])
        self.out, self.reads_text = FusedLoRA([out]), reads_text
        # Key and value of the text while it does not change.
        self.held_text: tuple[torch.Tensor, ...] | None = None

    @property
    def layers(self) -> list[FusedLoRA]:
        """The projections of this attention."""
        return [self.query, self.key_value, self.out] if self.reads_text else [self.query_key_value, self.out]

    def hold(self, text_BLK: torch.Tensor) -> None:
        """Compute everything that depends only on LoRA and text, once for all following calls."""
        for layer in self.layers:
            layer.hold()
        if self.reads_text:
            self.held_text = tuple(x_BLN.contiguous() for x_BLN in self.key_value(text_BLK))

    def let_go(self) -> None:
        """Go back to computing everything at every call."""
        self.held_text = None
        for layer in self.layers:
            layer.held = None

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        temb: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the attention of ``[B, L, K]`` to itself or to the text's states."""
        assert attention_mask is None, "Stable Diffusion's UNet masks nothing"
        hidden_states = self.shared.once(hidden_states)
        if self.reads_text:
            (query,) = self.query(hidden_states)
            assert encoder_hidden_states is not None
            key, value = self.key_value(encoder_hidden_states) if self.held_text is None else self.held_text
        else:
            query, key, value = self.query_key_value(hidden_states)
        heads = [x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (query, key, value)]
        joined = functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        (projected,) = self.out(joined)
        return self.shared.twice(projected)


class SplitGEGLU(torch.nn.Module):
    """``hidden * gelu(gate)`` with one product for each; replaces diffusers' GEGLU and keeps its weights."""

    def __init__(self, original: GEGLU) -> None:
        super().__init__()
        self.proj = original.proj

    def forward(self, x_BLK: torch.Tensor) -> torch.Tensor:
        """Map ``[B, L, K]`` to ``[B, L, N]``."""
        weights, biases = self.proj.weight.chunk(2), self.proj.bias.chunk(2)
        hidden, gate = (functional.linear(x_BLK, weight, bias) for weight, bias in zip(weights, biases, strict=True))
        return hidden * functional.gelu(gate)


@torch.library.custom_op("d3po::kept", mutates_args=())
def kept(x: torch.Tensor) -> torch.Tensor:
    """Return a copy that compiled code stores, so that it does not recompute the values at every use."""
    return x.clone()


kept.register_fake(torch.empty_like)
kept.register_autograd(lambda _, grad: grad)


class ScaledGroupNorm(torch.nn.Module):
    """A group norm as one scale and one shift per channel, for compiled code; keeps the original's weights.

    Without it, the compiler looks up group, statistics and weights for every element, in twice the time.
    """

    def __init__(self, original: torch.nn.GroupNorm) -> None:
        super().__init__()
        self.num_groups, self.eps = original.num_groups, original.eps
        self.weight, self.bias = original.weight, original.bias

    def forward(self, x_BCP: torch.Tensor) -> torch.Tensor:
        """Normalise ``[B, C, ...]``; statistics, scale and shift are in single precision."""
        groups_BPGK = x_BCP.movedim(1, -1).reshape(len(x_BCP), -1, self.num_groups, x_BCP.shape[1] // self.num_groups)
        variance_BG, mean_BG = torch.var_mean(groups_BPGK.float(), dim=(1, 3), correction=0)
        weight_GK, bias_GK = (x_C.float().view(self.num_groups, -1) for x_C in (self.weight, self.bias))
        scale_BGK = torch.rsqrt(variance_BG + self.eps)[..., None] * weight_GK
        shift_BGK = bias_GK - mean_BG[..., None] * scale_BGK
        both_2BC = kept(torch.stack([scale_BGK, shift_BGK])).flatten(2)
        scale_BC1, shift_BC1 = both_2BC.view(*both_2BC.shape, *[1] * (x_BCP.ndim - 2)).unbind(0)
        return (x_BCP.float() * scale_BC1 + shift_BC1).to(x_BCP.dtype)


def replace_modules(
    network: torch.nn.Module,
    kind: type[Original],
    made_of: Callable[[Original], torch.nn.Module],
    fits: Callable[[Original], bool] = lambda _: True,
) -> None:
    """Replace all modules of exactly this type that ``fits`` accepts."""
    for module in list(network.modules()):
        for name, child in module.named_children():
            if type(child) is kind and fits(child):
                setattr(module, name, made_of(child))


def scale_group_norms(network: torch.nn.Module) -> None:
    """Replace a network's group norms by ScaledGroupNorm."""
    replace_modules(network, torch.nn.GroupNorm, ScaledGroupNorm)


def split_gated_layers(network: torch.nn.Module) -> None:
    """Replace the gated layers that have a plain projection without a LoRA."""
    for feed_forward in network.modules():
        if isinstance(feed_forward, FeedForward):
            gated = feed_forward.net[0]
            if type(gated) is GEGLU and type(gated.proj) is torch.nn.Linear and gated.proj.bias is not None:
                feed_forward.net[0] = SplitGEGLU(gated)


def fuse_attention(network: torch.nn.Module) -> None:
    """Replace the processors of all attentions whose four projections have a LoRA."""
    for attention in network.modules():
        if isinstance(attention, Attention) and _can_be_fused(attention):
            attention.set_processor(FusedAttention(attention, reads_text=attention.is_cross_attention))


@contextlib.contextmanager
def constants_held(network: torch.nn.Module, text_BLK: torch.Tensor) -> Iterator[None]:
    """Fix text and LoRA for all passes in this context, which must be without gradient: see FusedAttention.hold."""
    processors = [getattr(module, "processor", None) for module in network.modules()]
    fused = [processor for processor in processors if isinstance(processor, FusedAttention)]
    try:
        for processor in fused:
            processor.hold(text_BLK)
        yield
    finally:
        for processor in fused:
            processor.let_go()


def share_rows_until_text(unet: UNet2DConditionModel) -> SharedRows:
    """Make a UNet that reads text only by attention compute its first blocks once for both texts of guidance.

    These are the first residual block, and the first attention if it is a fused self-attention.

    Returns:
        The switch: set ``come_twice`` if the next pass has its rows twice.
    """
    shared = SharedRows()
    block = unet.down_blocks[0].resnets[0]
    block.register_forward_pre_hook(lambda _block, args: tuple(shared.once(x_B) for x_B in args))
    block.register_forward_hook(lambda _block, _args, output: shared.twice(output))
    first = next((module.processor for module in unet.modules() if isinstance(module, Attention)), None)
    if isinstance(first, FusedAttention) and not first.reads_text:
        first.shared = shared
    return shared


def _can_be_fused(attention: Attention) -> bool:
    """Return whether an attention is plain: it does nothing beyond what FusedAttention does."""
    projections = [attention.to_q, attention.to_k, attention.to_v, attention.to_out[0]]
    extras = (attention.group_norm, attention.spatial_norm, attention.norm_q, attention.norm_k, attention.norm_cross)
    return (
        all(type(layer) is Linear for layer in projections)
        and isinstance(attention.processor, AttnProcessor2_0)
        and all(extra is None for extra in extras)
        and all(layer.get_base_layer().bias is None for layer in projections[:3])
        and not attention.residual_connection
        and not attention.upcast_attention
        and attention.rescale_output_factor == 1.0
    )
