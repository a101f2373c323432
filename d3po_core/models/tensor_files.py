"""Safetensors files as people have them: their headers, sets of shards, and weights stored in 8 bits.

ComfyUI stores a layer in 8 bits as ``X.weight`` in float8 beside ``X.scale_weight`` (with a tensor ``scaled_fp8``) or,
since late 2025, ``X.weight_scale`` (with ``X.comfy_quant``); the weight is their product. Scales of a layer's input
serve products in 8 bits only. Sources: ComfyUI ``comfy/ops.py``, ``comfy/model_detection.py``, comfy-kitchen.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from d3po_core.errors import D3POError

# Real weight headers take some 100 kB; a larger one is something else.
MOST_HEADER_BYTES = 25_000_000
EIGHT_BITS = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
FLOATS = ("F64", "F32", "F16", "BF16")
SCALES = (".scale_weight", ".weight_scale")
# What only products in 8 bits need, and a tokenizer that some files carry.
_UNUSED = re.compile(r"(^|\.)(scale_input|input_scale|comfy_quant|scaled_fp8|spiece_model)$")
_SHARD = re.compile(r".+-\d{5}-of-\d{5}")


def header_of(whose: str, path: Path) -> dict[str, Any]:
    """Return a safetensors file's header.

    Args:
        whose: the setting that names the file, for messages.
        path: the file.

    Raises:
        D3POError: the file is truncated, is not safetensors, or has an oversized header.
    """
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            found = path.stat().st_size
            if not 2 <= size <= min(MOST_HEADER_BYTES, found - 8):
                raise ValueError(f"a header of {size} bytes in a file of {found}; at most {MOST_HEADER_BYTES}")
            header: dict[str, Any] = json.loads(file.read(size))
        entries = [entry for name, entry in header.items() if name != "__metadata__"]
        end = max((entry["data_offsets"][1] for entry in entries), default=0)
        if found != 8 + size + end or not all(isinstance(entry["shape"], list) for entry in entries):
            raise ValueError(f"{found} bytes; its header needs {8 + size + end}")
        return header
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        reason = str(error)[:200] if isinstance(error, OSError | ValueError) else "its header is damaged"
        raise D3POError(f"{whose}: {path.parent.name}/{path.name} is no whole safetensors file "
                        f"({reason}); copy it again") from None  # fmt: skip


def tensors_of(whose: str, path: Path) -> dict[str, dict[str, Any]]:
    """Return a safetensors file's entries ``dtype`` and ``shape`` by tensor; D3POError as ``header_of``."""
    return {name: entry for name, entry in header_of(whose, path).items() if name != "__metadata__"}


def check_shards(whose: str, part: Path, files: Iterable[Path], variant: str | None) -> None:
    """Check that weights split over several files are all there, each with the tensors that the index says.

    Args:
        whose: the setting that names the model, for messages.
        part: the part's folder.
        files: its weight files.
        variant: the variant whose files these are, if any.

    Raises:
        D3POError: a shard or the index is missing, or they contradict each other.
    """
    names = (f"*.safetensors.index.{variant}.json", f"*.{variant}.safetensors.index.json") if variant else (
        "*.safetensors.index.json",)  # fmt: skip
    index = next((path for name in names for path in part.glob(name)), None)
    if index is None:
        shards = [path for path in files if _SHARD.fullmatch(path.stem)]
        if shards:
            raise D3POError(
                f"{whose}: {part.name} has shards such as {shards[0].name} but no *.safetensors.index.json, which says "
                "what is in which; copy the folder again"
            )
        return
    for name, wanted in _index_of(whose, index).items():
        if not (part / name).is_file():
            raise D3POError(
                f"{whose}: {part.name}/{name} is missing, a shard that {index.name} names; copy or download the folder "
                "again"
            )
        lacking = sorted(wanted - tensors_of(whose, part / name).keys())
        if lacking:
            raise D3POError(f"{whose}: {part.name}/{name} lacks {len(lacking)} tensors that {index.name} places in it, "
                            f"such as {lacking[0]}; copy the folder again")  # fmt: skip


def _index_of(whose: str, path: Path) -> dict[str, set[str]]:
    """Return the tensors that an index places in each file."""
    try:
        places = json.loads(path.read_text())["weight_map"]
        files: dict[str, set[str]] = {}
        for tensor, name in sorted(places.items()):
            if Path(name).name != name:
                raise ValueError(f"a shard named {name!r}")
            files.setdefault(name, set()).add(tensor)
        return files
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise D3POError(f"{whose}: {path.parent.name}/{path.name} is no index of shards ({str(error)[:200]}); copy it "
                        "again") from None  # fmt: skip


def stored_in_8_bits(whose: str, files: Iterable[Path]) -> str | None:
    """Return how weights are stored if any take 8 bits, such as ``float8_e4m3fn with scales``; else None.

    Raises:
        D3POError: they are quantised in a way that is not read here.
    """
    kinds, scaled = set[str](), False
    for path in files:
        for name, entry in tensors_of(whose, path).items():
            kind = entry.get("dtype")
            if _UNUSED.search(name):
                continue
            scaled = scaled or name.endswith(SCALES)
            if kind in EIGHT_BITS:
                kinds.add(EIGHT_BITS[kind])
            elif name.endswith("weight") and kind not in FLOATS:
                raise D3POError(f"{whose}: {path.parent.name}/{path.name} stores {name} as {kind}; expected floating "
                                f"point, or {' or '.join(EIGHT_BITS.values())}: take another copy")  # fmt: skip
    said = " and ".join(sorted(kinds)) or ("weights" if scaled else None)
    return f"{said} with scales" if said and scaled else said


def read_weights(whose: str, files: Iterable[Path], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the weights of files by name; those stored in 8 bits become ``dtype``, with their scales applied.

    Raises:
        D3POError: a scale fits no weight, or is not finite.
    """
    state: dict[str, torch.Tensor] = {}
    for path in files:
        _check_quantisation(whose, path)
        state |= load_file(path)
    scales = {name: state.pop(name) for name in list(state) if name.endswith(SCALES)}
    state = {name: value for name, value in state.items() if not _UNUSED.search(name)}
    eight = {name for name, value in state.items() if value.dtype in (torch.float8_e4m3fn, torch.float8_e5m2)}
    for name, scale in scales.items():
        weight = f"{name.rpartition('.')[0]}.weight"
        if weight not in state:
            raise D3POError(f"{whose}: {name} scales {weight}, which is missing; copy the file again")
        state[weight] = _scaled(whose, name, state[weight], scale).to(dtype)
        eight.discard(weight)
    return state | {name: state[name].to(dtype) for name in eight}


def _scaled(whose: str, name: str, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return a weight times its scale, in single precision: one for all, or one per row."""
    rows = scale.numel() == len(weight) and scale.shape[0] == len(weight)
    if not (scale.numel() == 1 or rows) or not scale.isfinite().all():
        raise D3POError(f"{whose}: {name} has the shape {tuple(scale.shape)} for a weight of {tuple(weight.shape)}, or "
                        "is not finite; expected one number, or one per row: take another copy")  # fmt: skip
    return weight.float() * scale.float().reshape(-1, *[1] * (weight.ndim - 1))


def _check_quantisation(whose: str, path: Path) -> None:
    """Refuse layers that a file marks as quantised in another way than by a float8 and a scale."""
    marks = {name: value for name, value in _marks(path).items() if value not in EIGHT_BITS.values()}
    if marks:
        name, found = next(iter(marks.items()))
        raise D3POError(f"{whose}: {path.name} marks {name} as {found!r}; expected {' or '.join(EIGHT_BITS.values())}: "
                        "take another copy")  # fmt: skip


def _marks(path: Path) -> dict[str, Any]:
    """Return the format of each layer that a file says to be quantised."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        said = json.loads((file.metadata() or {}).get("_quantization_metadata", "{}")).get("layers", {})
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            if name.endswith(".comfy_quant"):
                said[name.removesuffix(".comfy_quant")] = json.loads(bytes(file.get_tensor(name).tolist()))
    return {layer: mark.get("format") for layer, mark in said.items()}
