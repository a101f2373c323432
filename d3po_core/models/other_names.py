"""Names of a network's layers in other programs: their authors' and kohya's, as LoRA files have them.

Authors' networks join projections that diffusers keeps apart: queries, keys and values are one layer there. Sources:
kohya-ss/sd-scripts ``networks/lora_flux.py``, ``networks/lora_sd3.py``, ``library/sdxl_*``; ComfyUI ``comfy/lora.py``.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

_RESNET = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1",
           "conv_shortcut": "skip_connection"}  # fmt: skip
_OUTER = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0", "conv_out": "out.2",
}  # fmt: skip
QKV = {"to_q": 1, "to_k": 1, "to_v": 1}
ADDED_QKV = {"add_q_proj": 1, "add_k_proj": 1, "add_v_proj": 1}


@dataclass(frozen=True)
class Blocks:
    """Names of a kind of block.

    Attributes:
        ours: the list of blocks in diffusers.
        theirs: the same in the authors' code.
        plain: layer by layer, ours to theirs.
        joined: their layer to our layers in it, each with its height as a multiple of the network's width.
    """

    ours: str
    theirs: str
    plain: Mapping[str, str]
    joined: Mapping[str, Mapping[str, int]]


def _of(attention: str, names: Mapping[str, int]) -> dict[str, int]:
    return {f"{attention}.{name}": height for name, height in names.items()}


_FLUX_ATTENTION = {"attn.to_out.0": "img_attn.proj", "attn.to_add_out": "txt_attn.proj"}
_FLUX_JOINED = {"img_attn.qkv": _of("attn", QKV), "txt_attn.qkv": _of("attn", ADDED_QKV)}
NATIVE: dict[str, tuple[Blocks, ...]] = {
    "FluxPipeline": (
        Blocks("transformer_blocks", "double_blocks", _FLUX_ATTENTION | {
            "ff.net.0.proj": "img_mlp.0", "ff.net.2": "img_mlp.2", "norm1.linear": "img_mod.lin",
            "ff_context.net.0.proj": "txt_mlp.0", "ff_context.net.2": "txt_mlp.2",
            "norm1_context.linear": "txt_mod.lin",
        }, _FLUX_JOINED),
        Blocks("single_transformer_blocks", "single_blocks",
               {"proj_out": "linear2", "norm.linear": "modulation.lin"},
               {"linear1": {**_of("attn", QKV), "proj_mlp": 4}}),
    ),
    "Flux2KleinPipeline": (
        Blocks("transformer_blocks", "double_blocks", _FLUX_ATTENTION | {
            "ff.linear_in": "img_mlp.0", "ff.linear_out": "img_mlp.2",
            "ff_context.linear_in": "txt_mlp.0", "ff_context.linear_out": "txt_mlp.2",
        }, _FLUX_JOINED),
        Blocks("single_transformer_blocks", "single_blocks",
               {"attn.to_qkv_mlp_proj": "linear1", "attn.to_out": "linear2"}, {}),
    ),
    "StableDiffusion3Pipeline": (
        Blocks("transformer_blocks", "joint_blocks", {
            "attn.to_out.0": "x_block.attn.proj", "attn.to_add_out": "context_block.attn.proj",
            "attn2.to_out.0": "x_block.attn2.proj",
            "ff.net.0.proj": "x_block.mlp.fc1", "ff.net.2": "x_block.mlp.fc2",
            "ff_context.net.0.proj": "context_block.mlp.fc1", "ff_context.net.2": "context_block.mlp.fc2",
        }, {
            "x_block.attn.qkv": _of("attn", QKV), "context_block.attn.qkv": _of("attn", ADDED_QKV),
            "x_block.attn2.qkv": _of("attn2", QKV),
        }),
    ),
}  # fmt: skip


def first_authors_name(module: str, layers_per_block: int) -> str:
    """Return a UNet module's name in the first Stable Diffusion code; any block may hold attention.

    Args:
        module: its name in diffusers, such as ``down_blocks.1.attentions.0.proj_in``.
        layers_per_block: as in the UNet's configuration.
    """
    side, _, rest = module.partition("_blocks." if not module.startswith("mid_block") else "_block.")
    if side not in ("down", "up", "mid"):
        return next((new + module[len(old) :] for old, new in _OUTER.items() if module.startswith(old)), module)
    block, kind, place, inner = _parts(rest if side != "mid" else f"0.{rest}")
    if kind == "resnets":
        inner = re.sub(r"^\w+", lambda match: _RESNET.get(match[0], match[0]), inner)
    if side == "mid":  # a resnet, an attention, a resnet
        return f"middle_block.{2 * place if kind == 'resnets' else 2 * place + 1}.{inner}"
    if side == "down":
        if kind == "downsamplers":
            return f"input_blocks.{(layers_per_block + 1) * (block + 1)}.0.{inner.replace('conv', 'op')}"
        return f"input_blocks.{(layers_per_block + 1) * block + place + 1}.{int(kind == 'attentions')}.{inner}"
    if kind == "upsamplers":
        return f"output_blocks.{(layers_per_block + 1) * block + layers_per_block}.2.{inner}"
    return f"output_blocks.{(layers_per_block + 1) * block + place}.{int(kind == 'attentions')}.{inner}"


def _parts(name: str) -> tuple[int, str, int, str]:
    block, kind, place, inner = name.split(".", 3)
    return int(block), kind, int(place), inner
