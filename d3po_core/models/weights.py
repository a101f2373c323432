"""A checkpoint's file of trained weights: a LoRA, or a whole network in diffusers' format."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from d3po_core.errors import D3POError
from d3po_core.paths import resolve_path

if TYPE_CHECKING:
    import torch

    from d3po_core.config import ModelConfig

LORA_FILE = "pytorch_lora_weights.safetensors"
ADAPTER_FILE, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # PEFT's
NETWORK_FILE = "diffusion_pytorch_model.safetensors"


def weights_file(folder: Path) -> Path:
    """Return the path of the trained weights, even if missing; a whole network lies beside its configuration."""
    network = next(folder.glob("*/config.json"), None)
    return network.with_name(NETWORK_FILE) if network else folder / LORA_FILE


def weights_sha256(folder: Path) -> str:
    """Return the digest of a checkpoint's file of trained weights."""
    with weights_file(folder).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def loading_line(folder: Path, shown: str, model: "ModelConfig | None" = None) -> str:
    """Return the line of Python that loads a checkpoint's weights into a diffusers pipeline ``pipe``.

    Args:
        folder: the checkpoint.
        shown: the folder as a Python expression, for the line.
        model: the round's settings, if the line is to merge the LoRA that the campaign went on from.
    """
    file = weights_file(folder)
    if file.name == LORA_FILE:
        first = merging_lines(model, _part(file)) if model and model.start_from else []
        return "; ".join([*first, f"pipe.load_lora_weights({shown})"])
    part, kind = file.parent.name, json.loads((file.parent / "config.json").read_text())["_class_name"]
    return f'pipe.{part} = diffusers.{kind}.from_pretrained({shown}, subfolder="{part}")'


def _part(file: Path) -> str:
    """Return the pipeline's part that a LoRA's file changes."""
    with file.open("rb") as weights:
        header = json.loads(weights.read(int.from_bytes(weights.read(8), "little")))
    return min(name for name in header if name != "__metadata__").partition(".")[0]


def merging_lines(model: "ModelConfig", part: str, shown: str | None = None) -> list[str]:
    """Return lines of Python that merge the start of a campaign into ``pipe``; none if its LoRA needs none.

    Args:
        model: the round's settings.
        part: the pipeline's part that is trained.
        shown: the start's name, if it is not to be that on this machine.
    """
    if not model.start_from or model.start_as == "continue" or model.train == "full":
        return []
    place = resolve_path(model.start_from)
    start = shown or (str(place) if place.exists() else model.start_from)
    if (place / ADAPTER_FILE).is_file():
        merged = f"peft.PeftModel.from_pretrained(pipe.{part}, {json.dumps(start)}).merge_and_unload()"
        return ["import peft", f"pipe.{part} = {merged}"]
    hub_id, file = ("/".join(parts) for parts in (start.split("/")[:2], start.split("/")[2:]))
    inside = file and not start.startswith("/")
    named = f"{json.dumps(hub_id)}, weight_name={json.dumps(file)}" if inside else json.dumps(start)
    return [f"pipe.load_lora_weights({named})", "pipe.fuse_lora()", "pipe.unload_lora_weights()"]


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
