"""A checkpoint's file of trained weights: a LoRA, or a whole network in diffusers' format."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from d3po_core.errors import D3POError

if TYPE_CHECKING:
    import torch

LORA_FILE = "pytorch_lora_weights.safetensors"
NETWORK_FILE = "diffusion_pytorch_model.safetensors"


def weights_file(folder: Path) -> Path:
    """Return the path of the trained weights, even if missing; a whole network lies beside its configuration."""
    network = next(folder.glob("*/config.json"), None)
    return network.with_name(NETWORK_FILE) if network else folder / LORA_FILE


def weights_sha256(folder: Path) -> str:
    """Return the digest of a checkpoint's file of trained weights."""
    with weights_file(folder).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def loading_line(folder: Path, shown: str) -> str:
    """Return the line of Python that loads a checkpoint's weights into a diffusers pipeline ``pipe``.

    Args:
        folder: the checkpoint.
        shown: the folder as a Python expression, for the line.
    """
    file = weights_file(folder)
    if file.name == LORA_FILE:
        return f"pipe.load_lora_weights({shown})"
    part, kind = file.parent.name, json.loads((file.parent / "config.json").read_text())["_class_name"]
    return f'pipe.{part} = diffusers.{kind}.from_pretrained({shown}, subfolder="{part}")'


def expect_finite(module: "torch.nn.Module", whose: str) -> None:
    """Check that a model's weights are finite.

    Raises:
        D3POError: some are NaN or infinite; the message begins with ``whose`` and names the first.
    """
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        # Minimum or maximum is NaN or infinite if any weight is.
        if value.is_floating_point() and value.numel() and not all(bound.isfinite() for bound in value.aminmax()):
            wrong = value.isfinite().logical_not().sum()
            raise D3POError(f"{whose}: {int(wrong)} of {value.numel()} numbers of {name} are NaN or infinite; "
                            "take another copy, or another precision if this one was converted")  # fmt: skip


def sort_metadata(path: Path) -> None:
    """Sort a safetensors file's metadata; the library's random order would make files of equal weights differ."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
    assert len(text) == size, "a header with its keys in another order is as long as before"
    path.write_bytes(content[:8] + text + content[8 + size :])
