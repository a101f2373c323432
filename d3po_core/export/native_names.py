"""Write a transformer's LoRA with its authors' names, for sd-scripts and ComfyUI.

Their networks join projections that diffusers keeps apart: queries, keys and values are one layer there. A joined LoRA
has the ranks of its parts side by side, and zeros where a part has none; it computes the same. Sources:
kohya-ss/sd-scripts ``networks/lora_flux.py``, ``networks/lora_sd3.py``; ComfyUI ``comfy/lora.py``.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from d3po_core.export.kohya import KOHYA_FILE
from d3po_core.models.other_names import NATIVE, Blocks
from d3po_core.models.weights import sort_metadata

# For the model card. sd-scripts does not train FLUX.2.
READERS = {
    "FluxPipeline": "sd-scripts and ComfyUI", "StableDiffusion3Pipeline": "sd-scripts and ComfyUI",
    "Flux2KleinPipeline": "ComfyUI",
}  # fmt: skip

Layer = tuple[torch.Tensor, torch.Tensor]


def write_native(lora_file: Path, folder: Path, rank: int, alpha: float, pipeline: str) -> Path | None:
    """Write a LoRA under its authors' names, and return the new file.

    Args:
        lora_file: the file that ``pipe.load_lora_weights`` reads.
        folder: the folder to write to.
        rank: rank of the LoRA.
        alpha: numerator of its scale; programs scale by alpha over the rank of the file's layer.
        pipeline: class of the base model's pipeline, one of ``NATIVE``.

    Returns:
        The file; None if a layer has no name there, as those outside the blocks.
    """
    state = load_file(lora_file)
    paths = sorted({name.partition(".lora_")[0] for name in state})
    layers = {p.removeprefix("transformer."): (state[f"{p}.lora_A.weight"], state[f"{p}.lora_B.weight"]) for p in paths}
    converted: dict[str, torch.Tensor] = {}
    for blocks in NATIVE[pipeline]:
        for number in sorted({int(m[1]) for path in layers if (m := re.match(rf"{blocks.ours}\.(\d+)\.", path))}):
            for their_layer, (down, up) in _converted(blocks, number, layers).items():
                name = "lora_unet_" + f"{blocks.theirs}.{number}.{their_layer}".replace(".", "_")
                converted[f"{name}.lora_down.weight"] = down.contiguous()
                converted[f"{name}.lora_up.weight"] = up.contiguous()
                converted[f"{name}.alpha"] = torch.tensor(float(alpha) * len(down) / rank)
    if layers:
        return None
    metadata = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(float(alpha)),
    }
    save_file(converted, folder / KOHYA_FILE, metadata=metadata)
    sort_metadata(folder / KOHYA_FILE)
    return folder / KOHYA_FILE


def _converted(blocks: Blocks, number: int, layers: dict[str, Layer]) -> dict[str, Layer]:
    """Take a block's layers out of ``layers``, and return them by their layer's name."""
    prefix = f"{blocks.ours}.{number}."
    found = {theirs: layers.pop(prefix + ours) for ours, theirs in blocks.plain.items() if prefix + ours in layers}
    for theirs, heights in blocks.joined.items():
        parts = {ours: layers.pop(prefix + ours, None) for ours in heights}
        if any(part is not None for part in parts.values()):
            found[theirs] = _joined(parts, heights)
    return found


def _joined(parts: Mapping[str, Layer | None], heights: Mapping[str, int]) -> Layer:
    """Return one layer for several that read the same input; parts without a LoRA become zeros."""
    width = next(part[0].shape[1] for part in parts.values() if part is not None)
    downs = [part[0] for part in parts.values() if part is not None]
    ups = [part[1] if part else downs[0].new_zeros(heights[name] * width, 0) for name, part in parts.items()]
    return torch.cat(downs), torch.block_diag(*ups)
