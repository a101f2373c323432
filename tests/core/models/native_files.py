"""Flow families' networks under their authors' names, written from diffusers' weights.

The layouts are written down here from the authors' module lists (black-forest-labs/flux ``model.py``,
Stability-AI/sd3.5 ``mmditx.py``, Tongyi-MAI/Z-Image), not taken from the library that reads such files.
"""

import re

import torch

State = dict[str, torch.Tensor]

Table = dict[str, str]
FLUX: Table = {
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "context_embedder": "txt_in", "x_embedder": "img_in", "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "transformer_blocks.N.norm1.linear": "double_blocks.N.img_mod.lin",
    "transformer_blocks.N.norm1_context.linear": "double_blocks.N.txt_mod.lin",
    "transformer_blocks.N.attn.norm_q.weight": "double_blocks.N.img_attn.norm.query_norm.scale",
    "transformer_blocks.N.attn.norm_k.weight": "double_blocks.N.img_attn.norm.key_norm.scale",
    "transformer_blocks.N.attn.norm_added_q.weight": "double_blocks.N.txt_attn.norm.query_norm.scale",
    "transformer_blocks.N.attn.norm_added_k.weight": "double_blocks.N.txt_attn.norm.key_norm.scale",
    "transformer_blocks.N.ff.net.0.proj": "double_blocks.N.img_mlp.0",
    "transformer_blocks.N.ff.net.2": "double_blocks.N.img_mlp.2",
    "transformer_blocks.N.ff_context.net.0.proj": "double_blocks.N.txt_mlp.0",
    "transformer_blocks.N.ff_context.net.2": "double_blocks.N.txt_mlp.2",
    "transformer_blocks.N.attn.to_out.0": "double_blocks.N.img_attn.proj",
    "transformer_blocks.N.attn.to_add_out": "double_blocks.N.txt_attn.proj",
    "single_transformer_blocks.N.norm.linear": "single_blocks.N.modulation.lin",
    "single_transformer_blocks.N.attn.norm_q.weight": "single_blocks.N.norm.query_norm.scale",
    "single_transformer_blocks.N.attn.norm_k.weight": "single_blocks.N.norm.key_norm.scale",
    "single_transformer_blocks.N.proj_out": "single_blocks.N.linear2",
}  # fmt: skip
SD3: Table = {
    "pos_embed.pos_embed": "pos_embed", "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder", "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    **{f"transformer_blocks.N.{ours}": f"joint_blocks.N.{theirs}" for ours, theirs in {
        "attn.norm_q": "x_block.attn.ln_q", "attn.norm_k": "x_block.attn.ln_k",
        "attn.norm_added_q": "context_block.attn.ln_q", "attn.norm_added_k": "context_block.attn.ln_k",
        "attn2.norm_q": "x_block.attn2.ln_q", "attn2.norm_k": "x_block.attn2.ln_k",
        "attn.to_out.0": "x_block.attn.proj", "attn.to_add_out": "context_block.attn.proj",
        "attn2.to_out.0": "x_block.attn2.proj", "norm1.linear": "x_block.adaLN_modulation.1",
        "norm1_context.linear": "context_block.adaLN_modulation.1",
        "ff.net.0.proj": "x_block.mlp.fc1", "ff.net.2": "x_block.mlp.fc2",
        "ff_context.net.0.proj": "context_block.mlp.fc1", "ff_context.net.2": "context_block.mlp.fc2",
    }.items()},
}  # fmt: skip
Z_IMAGE: Table = {
    "all_final_layer.2-1": "final_layer", "all_x_embedder.2-1": "x_embedder",
    **{f"{block}.N.attention.{ours}": f"{block}.N.attention.{theirs}"
       for block in ("layers", "noise_refiner", "context_refiner")
       for ours, theirs in {"to_out.0": "out", "norm_q": "q_norm", "norm_k": "k_norm"}.items()},
}  # fmt: skip
KLEIN: Table = {
    "x_embedder": "img_in", "context_embedder": "txt_in", "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    **{name: theirs for name, theirs in FLUX.items() if "attn." in name and name.startswith("transformer_blocks.")},
    "transformer_blocks.N.ff.linear_in": "double_blocks.N.img_mlp.0",
    "transformer_blocks.N.ff.linear_out": "double_blocks.N.img_mlp.2",
    "transformer_blocks.N.ff_context.linear_in": "double_blocks.N.txt_mlp.0",
    "transformer_blocks.N.ff_context.linear_out": "double_blocks.N.txt_mlp.2",
    "single_transformer_blocks.N.attn.to_qkv_mlp_proj": "single_blocks.N.linear1",
    "single_transformer_blocks.N.attn.to_out": "single_blocks.N.linear2",
    "single_transformer_blocks.N.attn.norm_q.weight": "single_blocks.N.norm.query_norm.scale",
    "single_transformer_blocks.N.attn.norm_k.weight": "single_blocks.N.norm.key_norm.scale",
}  # fmt: skip
# Their joined layer -> our layers in it, in order.
JOINED: dict[str, dict[str, tuple[str, ...]]] = {
    "flux": {
        "double_blocks.N.img_attn.qkv": tuple(f"transformer_blocks.N.attn.to_{x}" for x in "qkv"),
        "double_blocks.N.txt_attn.qkv": tuple(f"transformer_blocks.N.attn.add_{x}_proj" for x in "qkv"),
        "single_blocks.N.linear1": (
            *(f"single_transformer_blocks.N.attn.to_{x}" for x in "qkv"), "single_transformer_blocks.N.proj_mlp",
        ),
    },
    "sd35": {
        "joint_blocks.N.x_block.attn.qkv": tuple(f"transformer_blocks.N.attn.to_{x}" for x in "qkv"),
        "joint_blocks.N.x_block.attn2.qkv": tuple(f"transformer_blocks.N.attn2.to_{x}" for x in "qkv"),
        "joint_blocks.N.context_block.attn.qkv": tuple(f"transformer_blocks.N.attn.add_{x}_proj" for x in "qkv"),
    },
    "z-image": {
        f"{block}.N.attention.qkv": tuple(f"{block}.N.attention.to_{x}" for x in "qkv")
        for block in ("layers", "noise_refiner", "context_refiner")
    },
}  # fmt: skip
JOINED["klein"] = {theirs: ours for theirs, ours in JOINED["flux"].items() if "double" in theirs}
TABLES = {"flux": FLUX, "klein": KLEIN, "sd35": SD3, "z-image": Z_IMAGE}


def native_state(kind: str, state: State, blocks: int = 0) -> State:
    """Return a network's weights under its authors' names; Qwen-Image's are those of diffusers, and SANA's are left so.

    Args:
        kind: ``flux``, ``klein``, ``sd35``, ``z-image``, ``qwen`` or ``sana``.
        state: the network's weights in diffusers.
        blocks: the number of joint blocks, for Stable Diffusion 3.
    """
    if kind in ("qwen", "sana"):
        return dict(state)
    state, found = dict(state), State()
    for theirs, ours in JOINED[kind].items():
        for number in sorted({m[1] for name in state if (m := re.search(r"\.(\d+)\.", name))}):
            for half in ("weight", "bias"):
                names = [f"{name.replace('N', number)}.{half}" for name in ours]
                if names[0] in state:
                    found[f"{theirs.replace('.N.', f'.{number}.')}.{half}"] = torch.cat([state.pop(n) for n in names])
    for name, value in state.items():
        found[_renamed(name, TABLES[kind])] = _swapped(kind, name, value, blocks)
    return found


def _renamed(name: str, table: Table) -> str:
    number = m[1] if (m := re.match(r"\w+\.(\d+)\.", name)) else ""
    plain = re.sub(r"^(\w+)\.\d+\.", r"\1.N.", name) if number and "2-1" not in name else name
    for ours, theirs in table.items():
        if plain == ours or plain.startswith(f"{ours}."):
            return (theirs + plain[len(ours) :]).replace(".N.", f".{number}.")
    return name


def _swapped(kind: str, name: str, value: torch.Tensor, blocks: int) -> torch.Tensor:
    """The authors keep shift before scale where diffusers keeps scale before shift."""
    last = kind == "sd35" and name.startswith(f"transformer_blocks.{blocks - 1}.norm1_context.linear")
    if kind in ("flux", "klein", "sd35") and (name.startswith("norm_out.linear") or last):
        return torch.cat(value.chunk(2)[::-1])
    return value
