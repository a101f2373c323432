"""Write a LoRA for other programs: with kohya's names, or with alpha as a tensor.

`kohya.safetensors` is for sd-scripts, ComfyUI and AUTOMATIC1111. Stable Diffusion 1.x and 2.x keep diffusers' block
names. XL uses the first authors' names (``input_blocks_4_1_...``): all three programs read them, sd-scripts no others.
`comfyui.safetensors` is for ComfyUI with Stable Diffusion 3. It has diffusers' names and alpha as a tensor, since
ComfyUI reads alpha there and diffusers reads it from the file's metadata. Sources: kohya-ss/sd-scripts
``networks/lora.py``, ``library/sdxl_*``; ComfyUI ``comfy/lora.py``; AUTOMATIC1111
``extensions-builtin/Lora/network.py``.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from d3po_core.models.other_names import first_authors_name
from d3po_core.models.weights import sort_metadata

KOHYA_FILE, COMFYUI_FILE = "kohya.safetensors", "comfyui.safetensors"
# For the model card: the programs that read each file.
READERS = {
    KOHYA_FILE: "ComfyUI, AUTOMATIC1111 and sd-scripts: put it into their folder of LoRAs",
    COMFYUI_FILE: "ComfyUI: put it into its folder `models/loras`",
}
# Width of a UNet's text input -> the model's name in the file's metadata.
BASE_VERSIONS = {768: "sd_v1", 1024: "sd_v2", 2048: "sdxl_base_v1-0"}
_HALVES = {"lora_A.weight": "lora_down.weight", "lora_B.weight": "lora_up.weight"}


def write_for_others(lora_file: Path, folder: Path, rank: int, alpha: float, layers_per_block: int | None) -> Path:
    """Write a LoRA for programs that cannot read diffusers' file, and return the new file.

    Args:
        lora_file: the file that ``pipe.load_lora_weights`` reads.
        folder: the folder to write to.
        rank: rank of the LoRA.
        alpha: numerator of its scale; programs scale by alpha / rank.
        layers_per_block: the UNet's, if it uses XL's naming; otherwise None.
    """
    state = load_file(lora_file)
    of_unet = all(name.startswith("unet.") for name in state)
    output = folder / (KOHYA_FILE if of_unet else COMFYUI_FILE)
    converted: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        module, _, half = name.partition(".lora_")
        half = f"lora_{half}"
        if of_unet:
            path = module.removeprefix("unet.")
            path = path if layers_per_block is None else first_authors_name(path, layers_per_block)
            module, half = f"lora_unet_{path.replace('.', '_')}", _HALVES[half]
        converted[f"{module}.{half}"] = value.contiguous()
        converted[f"{module}.alpha"] = torch.tensor(float(alpha))
    save_file(converted, output, metadata=_metadata(state, rank, alpha) if of_unet else {"format": "pt"})
    sort_metadata(output)
    return output


def _metadata(state: dict[str, torch.Tensor], rank: int, alpha: float) -> dict[str, str]:
    """Return the metadata that sd-scripts writes; AUTOMATIC1111 recognises SD 2 by ``ss_v2``."""
    widths = {value.shape[1] for name, value in state.items() if name.endswith("attn2.to_k.lora_A.weight")}
    version = next((BASE_VERSIONS[width] for width in widths & BASE_VERSIONS.keys()), None)
    return {
        "ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": str(float(alpha)),
        "ss_v2": str(version == "sd_v2"), **({"ss_base_model_version": version} if version else {}),
    }  # fmt: skip
