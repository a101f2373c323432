"""A transformer's LoRA under its authors' names: read back by diffusers, and against the other programs' own maps."""

from pathlib import Path

import pytest
import torch
from diffusers import Flux2KleinPipeline, FluxPipeline
from safetensors.torch import load_file, save_file

from d3po_core.export.native_names import write_native
from d3po_core.seeds import gaussian

RANK, ALPHA = 2, 3.0
DOUBLE = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")


def lora(path: Path, layers: dict[str, tuple[int, int]]) -> Path:
    """A LoRA of random numbers; layers are names with their widths, in and out."""
    state = {}
    for n, (name, (narrow, wide)) in enumerate(layers.items()):
        state[f"transformer.{name}.lora_A.weight"] = gaussian(2 * n, RANK, narrow)
        state[f"transformer.{name}.lora_B.weight"] = gaussian(2 * n + 1, wide, RANK)
    save_file(state, path)
    return path


def products(state: dict[str, torch.Tensor], down: str, up: str) -> dict[str, torch.Tensor]:
    """What each layer adds to its weights."""
    names = [name.removesuffix(down) for name in state if name.endswith(down)]
    scales = {
        name: float(state[f"{name}.alpha"]) / len(state[name + down]) for name in names if f"{name}.alpha" in state
    }
    return {name: scales.get(name, 1.0) * state[name + up] @ state[name + down] for name in names}


FLUX = {
    **{f"transformer_blocks.3.{name}": (3072, 3072) for name in DOUBLE},
    **{f"single_transformer_blocks.7.{name}": (3072, 3072) for name in DOUBLE[:3]},
}
KLEIN = {
    **{f"transformer_blocks.3.{name}": (3072, 3072) for name in DOUBLE},
    "single_transformer_blocks.7.attn.to_qkv_mlp_proj": (3072, 9 * 3072),
}


@pytest.mark.parametrize(
    ("pipeline", "layers"), [(FluxPipeline, FLUX), (Flux2KleinPipeline, KLEIN)], ids=["flux", "klein"]
)
def test_diffusers_reads_back_what_the_lora_adds(
    pipeline: type[FluxPipeline], layers: dict[str, tuple[int, int]], tmp_path: Path
) -> None:
    """At the published width, which diffusers' reader takes for granted."""
    file = lora(tmp_path / "lora.safetensors", layers)
    written = write_native(file, tmp_path, RANK, ALPHA, pipeline.__name__)
    assert written is not None
    assert all(name.startswith("lora_unet_") for name in load_file(written))
    again = pipeline.lora_state_dict(tmp_path, weight_name=written.name)
    added = products(again[0] if isinstance(again, tuple) else again, ".lora_A.weight", ".lora_B.weight")
    for name, product in products(load_file(file), ".lora_A.weight", ".lora_B.weight").items():
        torch.testing.assert_close(added.pop(name), ALPHA / RANK * product, rtol=1e-4, atol=1e-3)
    assert all(not product.any() for product in added.values())  # layers that had no LoRA


WIDTH = 8
# ComfyUI, comfy/utils.py, flux_to_diffusers: where each of diffusers' layers stands in the authors' network, and which
# rows of it.
COMFYUI_FLUX = {
    "transformer_blocks.0.attn.to_q": ("double_blocks_0_img_attn_qkv", 0),
    "transformer_blocks.0.attn.to_k": ("double_blocks_0_img_attn_qkv", WIDTH),
    "transformer_blocks.0.attn.to_v": ("double_blocks_0_img_attn_qkv", 2 * WIDTH),
    "transformer_blocks.0.attn.add_q_proj": ("double_blocks_0_txt_attn_qkv", 0),
    "transformer_blocks.0.attn.add_k_proj": ("double_blocks_0_txt_attn_qkv", WIDTH),
    "transformer_blocks.0.attn.add_v_proj": ("double_blocks_0_txt_attn_qkv", 2 * WIDTH),
    "transformer_blocks.0.attn.to_out.0": ("double_blocks_0_img_attn_proj", 0),
    "transformer_blocks.0.attn.to_add_out": ("double_blocks_0_txt_attn_proj", 0),
    "single_transformer_blocks.1.attn.to_q": ("single_blocks_1_linear1", 0),
    "single_transformer_blocks.1.attn.to_k": ("single_blocks_1_linear1", WIDTH),
    "single_transformer_blocks.1.attn.to_v": ("single_blocks_1_linear1", 2 * WIDTH),
}
# sd-scripts, library/sd3_models.py: a joint block's two streams, each with queries, keys and values in one layer.
SD_SCRIPTS_SD3 = {
    "transformer_blocks.0.attn.to_q": ("joint_blocks_0_x_block_attn_qkv", 0),
    "transformer_blocks.0.attn.to_k": ("joint_blocks_0_x_block_attn_qkv", WIDTH),
    "transformer_blocks.0.attn.to_v": ("joint_blocks_0_x_block_attn_qkv", 2 * WIDTH),
    "transformer_blocks.0.attn.to_out.0": ("joint_blocks_0_x_block_attn_proj", 0),
    "transformer_blocks.0.attn2.to_q": ("joint_blocks_0_x_block_attn2_qkv", 0),
    "transformer_blocks.0.attn2.to_v": ("joint_blocks_0_x_block_attn2_qkv", 2 * WIDTH),
    "transformer_blocks.0.attn.add_k_proj": ("joint_blocks_0_context_block_attn_qkv", WIDTH),
}


@pytest.mark.parametrize(
    ("pipeline", "places", "heights"),
    [
        ("FluxPipeline", COMFYUI_FLUX, {"single_blocks_1_linear1": 7 * WIDTH}),
        ("StableDiffusion3Pipeline", SD_SCRIPTS_SD3, {}),
    ],
)
def test_every_layer_lies_where_other_programs_look_for_it(
    pipeline: str, places: dict[str, tuple[str, int]], heights: dict[str, int], tmp_path: Path
) -> None:
    file = lora(tmp_path / "lora.safetensors", dict.fromkeys(places, (WIDTH, WIDTH)))
    written = write_native(file, tmp_path, RANK, ALPHA, pipeline)
    assert written is not None
    added = products(load_file(written), ".lora_down.weight", ".lora_up.weight")
    assert set(added) == {f"lora_unet_{name}" for name, _ in places.values()}
    for name, product in products(load_file(file), ".lora_A.weight", ".lora_B.weight").items():
        theirs, row = places[name.removeprefix("transformer.")]
        rows = added[f"lora_unet_{theirs}"][row : row + WIDTH]
        torch.testing.assert_close(rows, ALPHA / RANK * product)
        rows.zero_()
    assert all(not product.any() for product in added.values())
    for theirs, product in added.items():
        name = theirs.removeprefix("lora_unet_")
        assert len(product) == heights.get(name, 3 * WIDTH if name.endswith("qkv") else WIDTH)


def test_a_layer_without_a_name_there_gives_no_file(tmp_path: Path) -> None:
    file = lora(tmp_path / "lora.safetensors", {"x_embedder": (8, 8), "transformer_blocks.0.attn.to_q": (8, 8)})
    assert write_native(file, tmp_path, RANK, ALPHA, "FluxPipeline") is None
