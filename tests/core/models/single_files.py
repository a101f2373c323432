"""Merged single files in the naming of the first Stable Diffusion code (CompVis, Stability AI), written from a folder.

The layout is written down here from that code's module lists, not taken from the library that reads such files:
``input_blocks``, ``middle_block`` and ``output_blocks`` number a UNet's layers through, a VAE's decoder counts its
blocks from the image, attentions of the VAE are 1 x 1 convolutions, and OpenCLIP keeps q, k and v in one matrix.
"""

import re
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from safetensors.torch import save_file

State = dict[str, torch.Tensor]

RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
}  # fmt: skip
OUTER = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
}  # fmt: skip
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}  # fmt: skip


def write_single_file(folder: Path, output: Path) -> Path:
    """Write a pipeline's folder as one merged file; returns its path."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    state = {f"model.diffusion_model.{name}": tensor for name, tensor in unet_state(pipeline.unet).items()}
    state |= {f"first_stage_model.{name}": tensor for name, tensor in vae_state(pipeline.vae.state_dict()).items()}
    first = pipeline.text_encoder.state_dict()
    if hasattr(pipeline, "text_encoder_2"):
        state |= under("conditioner.embedders.0.transformer.text_model.", plain_names(first))
        state |= under("conditioner.embedders.1.model.", open_clip_state(pipeline.text_encoder_2.state_dict()))
    elif folder.name == "sd2":
        state |= under("cond_stage_model.model.", open_clip_state(first))
    else:
        state |= under("cond_stage_model.transformer.text_model.", plain_names(first))
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, output)
    return output


def under(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def plain_names(state: State) -> State:
    return {name.removeprefix("text_model."): tensor for name, tensor in state.items()}


def renamed(name: str, names: dict[str, str]) -> str:
    for ours, theirs in names.items():
        if name == ours or name.startswith(f"{ours}."):
            return theirs + name[len(ours) :]
    return name


def unet_state(unet: UNet2DConditionModel) -> State:
    layers = unet.config.layers_per_block
    found = {}
    for name, tensor in unet.state_dict().items():
        match = re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", name)
        middle = re.match(r"mid_block\.(resnets|attentions)\.(\d+)\.(.*)", name)
        if middle:  # residual block, attention, residual block
            kind, number, rest = middle.groups()
            place = 1 if kind == "attentions" else 2 * int(number)
            key = f"middle_block.{place}.{renamed(rest, RESNET) if kind == 'resnets' else rest}"
        elif match:
            side, block, kind, number, rest = match.groups()
            attends = hasattr(getattr(unet, f"{side}_blocks")[int(block)], "attentions")
            if side == "down":  # a downsampler is a layer of its own, after the others
                place = 1 + int(block) * (layers + 1) + (layers if kind == "downsamplers" else int(number))
                inner = {"resnets": "0", "attentions": "1", "downsamplers": "0"}[kind]
                rest = rest.replace("conv.", "op.") if kind == "downsamplers" else rest
            else:  # an upsampler belongs to its block's last layer
                place = int(block) * (layers + 1) + (layers if kind == "upsamplers" else int(number))
                inner = {"resnets": "0", "attentions": "1", "upsamplers": "2" if attends else "1"}[kind]
            rest = renamed(rest, RESNET) if kind == "resnets" else rest
            key = f"{'input' if side == 'down' else 'output'}_blocks.{place}.{inner}.{rest}"
        else:
            key = renamed(name, OUTER)
        found[key] = tensor
    assert len(found) == len(unet.state_dict())
    return found


def vae_state(state: State) -> State:
    ups = 1 + max(int(match[1]) for name in state if (match := re.search(r"up_blocks\.(\d+)", name)))
    found = {}
    for name, tensor in state.items():
        key = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", name)
        key = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", key)
        key = re.sub(r"up_blocks\.(\d+)\.resnets", lambda match: f"up.{ups - 1 - int(match[1])}.block", key)
        key = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda match: f"up.{ups - 1 - int(match[1])}.upsample", key)
        key = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", key)
        key = key.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        side, separator, rest = key.partition(".mid_block.attentions.0.")
        if separator:
            key = f"{side}.mid.attn_1.{renamed(rest, VAE_ATTENTION)}"
            tensor = tensor[:, :, None, None] if tensor.ndim == 2 else tensor
        found[key] = tensor
    return found


def open_clip_state(state: State) -> State:
    state = plain_names(state)
    found = {
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
        **{f"ln_final.{part}": state[f"final_layer_norm.{part}"] for part in ("weight", "bias")},
    }
    if "text_projection.weight" in state:
        found["text_projection"] = state["text_projection.weight"].T
    for name, tensor in state.items():
        match = re.match(r"encoder\.layers\.(\d+)\.(.*)", name)
        if not match:
            continue
        block, rest = f"transformer.resblocks.{match[1]}", match[2]
        if projection := re.match(r"self_attn\.q_proj\.(weight|bias)", rest):
            parts = [state[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            found[f"{block}.attn.in_proj_{projection[1]}"] = torch.cat(parts)
        elif "_proj." not in rest or "out_proj" in rest:
            found[f"{block}.{renamed(rest, OPEN_CLIP)}"] = tensor
    return found
