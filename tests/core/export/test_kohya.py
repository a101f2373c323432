"""A LoRA for other programs, against each program's own map of names, restated from its source."""

from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from d3po_core.export.kohya import COMFYUI_FILE, KOHYA_FILE, write_for_others
from d3po_core.models.other_names import first_authors_name
from tests.core.models.single_files import unet_state
from tests.core.models.tiny_models import tiny_model

LAYERS = ("attn1", "attn2")
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out_0")
# sd-scripts, library/sdxl_original_unet.py: where the transformers stand, and how many blocks each has.
SDXL_TRANSFORMERS = {
    **{f"input_blocks_{n}_1": 2 for n in (4, 5)}, **{f"input_blocks_{n}_1": 10 for n in (7, 8)},
    "middle_block_1": 10,
    **{f"output_blocks_{n}_1": 10 for n in (0, 1, 2)}, **{f"output_blocks_{n}_1": 2 for n in (3, 4, 5)},
}  # fmt: skip
SDXL_MODULES = {
    f"lora_unet_{place}_transformer_blocks_{block}_{layer}_{projection}"
    for place, blocks in SDXL_TRANSFORMERS.items()
    for block in range(blocks)
    for layer in LAYERS
    for projection in PROJECTIONS
}


def lora(path: Path, modules: list[str], width: int, prefix: str = "unet") -> Path:
    state = {}
    for module in modules:
        state[f"{prefix}.{module}.lora_A.weight"] = torch.ones(2, width)
        state[f"{prefix}.{module}.lora_B.weight"] = torch.ones(8, 2)
    save_file(state, path)
    return path


def modules_in(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in load_file(path)}


def test_every_module_of_sdxl_has_sd_scripts_name(tmp_path: Path) -> None:
    """At the published size: 560 projections of attention, each found in sd-scripts' map when it merges."""
    with init_empty_weights():
        unet = UNet2DConditionModel(
            sample_size=128, block_out_channels=(320, 640, 1280), cross_attention_dim=2048,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20), use_linear_projection=True,
        )  # fmt: skip
    targets = ("to_q", "to_k", "to_v", "to_out.0")
    names = [name for name, _ in unet.named_modules() if name.endswith(targets)]
    file = lora(tmp_path / "lora.safetensors", names, 4)
    written = write_for_others(file, tmp_path, rank=2, alpha=2.0, layers_per_block=2)
    assert len(SDXL_MODULES) == 560
    assert modules_in(written) == SDXL_MODULES


def test_every_module_of_a_unet_has_the_first_authors_name(tmp_path: Path) -> None:
    """Against the layout of merged single files, which is written down from the first code's module lists."""
    unet = UNet2DConditionModel.from_pretrained(tiny_model("sdxl", tmp_path / "sdxl"), subfolder="unet")
    theirs = list(unet_state(unet))
    ours = [first_authors_name(name, unet.config.layers_per_block) for name in unet.state_dict()]
    layers = [n for n, name in enumerate(unet.state_dict()) if ".norm" not in name and "conv_norm_out" not in name]
    # The small model has one block without attention, whose upsampler the published layout does not have.
    wanted = [n for n in layers if "upsamplers" not in list(unet.state_dict())[n]]
    assert len(wanted) > 100
    assert [ours[n] for n in wanted] == [theirs[n] for n in wanted]


def detected_by_automatic1111(path: Path) -> str:
    """Its ``Network.detect_version``."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    if metadata.get("ss_base_model_version", "").startswith("sdxl_"):
        return "SDXL"
    return "SD2" if metadata.get("ss_v2") == "True" else "SD1"


@pytest.mark.parametrize(("width", "version"), [(768, "SD1"), (1024, "SD2"), (2048, "SDXL")])
def test_automatic1111_knows_the_base(tmp_path: Path, width: int, version: str) -> None:
    file = lora(tmp_path / "lora.safetensors", ["mid_block.attentions.0.transformer_blocks.0.attn2.to_k"], width)
    written = write_for_others(file, tmp_path, rank=2, alpha=2.0, layers_per_block=2 if version == "SDXL" else None)
    assert written.name == KOHYA_FILE
    assert detected_by_automatic1111(written) == version
    place = "middle_block_1" if version == "SDXL" else "mid_block_attentions_0"
    assert modules_in(written) == {f"lora_unet_{place}_transformer_blocks_0_attn2_to_k"}


def test_comfyui_scales_a_flow_models_lora_by_its_alpha(tmp_path: Path) -> None:
    """ComfyUI maps ``transformer.<diffusers' name>`` for SD3, and multiplies by the tensor ``.alpha`` over the rank."""
    module = "transformer_blocks.3.attn.to_q"
    file = lora(tmp_path / "lora.safetensors", [module], 16, prefix="transformer")
    written = write_for_others(file, tmp_path, rank=2, alpha=5.0, layers_per_block=None)
    assert written.name == COMFYUI_FILE
    state = load_file(written)
    assert set(state) == {f"transformer.{module}.{half}" for half in ("lora_A.weight", "lora_B.weight", "alpha")}
    assert float(state[f"transformer.{module}.alpha"]) / 2 == 2.5


def test_two_exports_of_a_lora_have_the_same_bytes(tmp_path: Path) -> None:
    file = lora(tmp_path / "lora.safetensors", ["mid_block.attentions.0.transformer_blocks.0.attn2.to_k"], 768)
    written = [write_for_others(file, tmp_path, 2, 2.0, None).read_bytes() for _ in range(8)]
    assert len(set(written)) == 1
