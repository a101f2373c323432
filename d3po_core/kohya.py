"""A LoRA in the naming of kohya's trainers, which ComfyUI and AUTOMATIC1111 read from one file."""

from pathlib import Path

import torch
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from safetensors.torch import load_file, save_file

KOHYA_FILE = "kohya.safetensors"
# Width of the text that a UNet reads, and what such models are called in the file's metadata.
BASE_VERSIONS = {768: "sd_v1", 1024: "sd_v2", 2048: "sdxl_base_v1-0"}


def write_kohya(lora_file: Path, output: Path, rank: int, alpha: float) -> bool:
    """Write a UNet's LoRA once more under kohya's names.

    Args:
        lora_file: the file that ``pipe.load_lora_weights`` reads.
        output: the file to write.
        rank: rank of the LoRA.
        alpha: numerator of its scale; programs scale by alpha / rank.

    Returns:
        Whether it was written: a transformer's LoRA (Stable Diffusion 3) has no such names.
    """
    state = load_file(lora_file)
    if not all(name.startswith("unet.") for name in state):
        return False
    converted = convert_state_dict_to_kohya(state)
    for name in converted:
        if name.endswith(".alpha"):  # the library writes the rank
            converted[name] = torch.tensor(float(alpha))
    widths = {value.shape[1] for name, value in state.items() if name.endswith("attn2.to_k.lora_A.weight")}
    metadata = {
        "ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": str(float(alpha)),
    }  # fmt: skip
    for width in widths & BASE_VERSIONS.keys():
        metadata["ss_base_model_version"] = BASE_VERSIONS[width]
    save_file({name: value.contiguous() for name, value in converted.items()}, output, metadata=metadata)
    return True
