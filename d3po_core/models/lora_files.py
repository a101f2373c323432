"""Read a LoRA's file of any of the usual formats: PEFT, diffusers, kohya, ComfyUI, or an export of d3po.

Nothing is dropped: a tensor without a known place is an error. The product of a layer is ``scale * up @ down``.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from d3po_core.errors import D3POError
from d3po_core.models.lora_names import Place
from d3po_core.models.tensor_files import header_of
from d3po_core.models.weights import ADAPTER_CONFIG, ADAPTER_FILE, LORA_FILE

# Where diffusers keeps PEFT's configurations, of all parts in one.
_METADATA = "lora_adapter_metadata"
_KEY = re.compile(r"(?P<layer>.+?)[._]lora[._](?P<half>A|B|down|up)(?:\.\w+)?\.weight")
_HALVES = {"A": "down", "down": "down", "B": "up", "up": "up"}
NAMED = 3


@dataclass(frozen=True)
class Layer:
    """A layer's LoRA in single precision: ``down`` [R, ...], ``up`` [rows, R, ...] and the factor of their product."""

    down: torch.Tensor
    up: torch.Tensor
    scale: float


Layers = dict[str, dict[str, Layer]]


def lora_in(whose: str, place: Path) -> Path:
    """Return the LoRA's file at a place: the file itself, or the one that a folder holds.

    Raises:
        D3POError: there is none, or it cannot be told which.
    """
    if place.is_file():
        if place.suffix != ".safetensors":
            raise D3POError(
                f"{whose}: is a {place.suffix or 'nameless'} file; expected .safetensors, which runs no code when it "
                "is read: convert it first"
            )
        if place.name == ADAPTER_FILE:
            raise D3POError(f"{whose}: name the folder instead, whose {ADAPTER_CONFIG} says how to scale this file")
        return place
    if (place / ADAPTER_CONFIG).is_file() and not (place / ADAPTER_FILE).is_file():
        raise D3POError(f"{whose}: {ADAPTER_FILE} is missing beside {ADAPTER_CONFIG}; copy the folder again")
    known = [place / name for name in (ADAPTER_FILE, LORA_FILE) if (place / name).is_file()]
    found = known[:1] or sorted(place.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    if next(place.glob("*/config.json"), None):
        raise D3POError(f"{whose}: is a whole network or model, no LoRA; name it as model.path")
    listed = ", ".join(path.name for path in found[:NAMED])
    raise D3POError(f"{whose}: has {f'several files ({listed}); name one of them' if found else 'no .safetensors file'}"
                    f"; expected {LORA_FILE}, {ADAPTER_FILE}, or one file")  # fmt: skip


def read_lora(whose: str, file: Path, places: Mapping[str, list[Place]]) -> Layers:
    """Return a LoRA's layers by the pipeline's part and the layer's name there.

    Args:
        whose: the setting that names the file, for messages.
        file: the file.
        places: from ``places_by_name``.

    Raises:
        D3POError: the file is damaged, has tensors without a place, or lacks some; one line.
    """
    header = header_of(whose, file)
    described = _described(whose, file, header.get("__metadata__") or {})
    pairs = _pairs(whose, load_file(file))
    unknown = sorted(name for name in pairs if name not in places)
    if unknown:
        raise D3POError(f"{whose}: {len(unknown)} of its {len(pairs)} layers are unknown to model.path, such as "
                        f"{unknown[0]}; is it a LoRA of that model?")  # fmt: skip
    found: Layers = {}
    for name, pair in pairs.items():
        for place in places[name]:
            layer = _part_of(whose, name, pair, _scale(whose, name, pair, described, place), place)
            if layer is None:
                continue
            of_part = found.setdefault(place.part, {})
            if place.layer in of_part:
                raise D3POError(f"{whose}: has the layer {place.layer} twice, under two names; take another copy")
            of_part[place.layer] = layer
    if not found:
        raise D3POError(f"{whose}: changes nothing: all of its products are 0")
    return found


def _pairs(whose: str, state: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Return the halves of each layer, and its alpha if it has one, by the name in the file."""
    pairs: dict[str, dict[str, torch.Tensor]] = {}
    unknown = []
    for key, value in state.items():
        match = _KEY.fullmatch(key)
        if key.endswith(".alpha"):
            pairs.setdefault(_plain(key.removesuffix(".alpha")), {})["alpha"] = value
        elif match:
            pairs.setdefault(_plain(match["layer"]), {})[_HALVES[match["half"]]] = value.float()
        else:
            unknown.append(key)
    if unknown or not pairs:
        raise D3POError(
            f"{whose}: {len(unknown)} of its {len(state)} tensors are of no LoRA that is read here, such as "
            f"{min(unknown, default='none')}; expected pairs of lora_A and lora_B, or lora_down and lora_up"
        )
    for name, pair in sorted(pairs.items()):
        lacking = sorted({"down", "up"} - pair.keys())
        if lacking:
            raise D3POError(f"{whose}: the layer {name} has no lora_{lacking[0]}; copy the file again")
        if not all(value.isfinite().all() for value in pair.values()):
            raise D3POError(f"{whose}: the layer {name} has numbers that are NaN or infinite; take another copy")
    return pairs


def _plain(name: str) -> str:
    """Return a layer's name without what early versions of diffusers put in."""
    return name.replace(".processor.", ".")


def _described(whose: str, file: Path, metadata: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what PEFT's configurations say, by part; one beside the file holds for all, under ``""``."""
    beside = file.with_name(ADAPTER_CONFIG)
    found: dict[str, dict[str, Any]] = {}
    try:
        if file.name == ADAPTER_FILE and beside.is_file():
            found[""] = dict(json.loads(beside.read_text()))
        else:
            for key, value in json.loads(metadata.get(_METADATA, "{}")).items():
                part, _, field = key.partition(".")
                found.setdefault(part, {})[field] = value
    except (OSError, ValueError, TypeError, RecursionError, AttributeError) as error:
        raise D3POError(f"{whose}: its {ADAPTER_CONFIG} or metadata cannot be read ({str(error)[:200]})") from None
    plain = {"use_dora": False, "bias": "none", "modules_to_save": None, "peft_type": "LORA"}
    for said in found.values():
        for field, expected in plain.items():
            if said.get(field, expected) not in (expected, [], {}):
                raise D3POError(f"{whose}: {field} is {str(said[field])[:60]!r}; expected {expected!r}, as a plain "
                                "LoRA has it")  # fmt: skip
    return found


def _scale(whose: str, name: str, pair: Mapping[str, torch.Tensor], described: Any, place: Place) -> float:
    """Return alpha over the rank; alpha is the layer's own, what PEFT's configuration says, or the rank."""
    rank, said = len(pair["down"]), described.get(place.part, described.get("", {}))
    alpha = said.get("lora_alpha", rank)
    for pattern, value in (said.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", place.layer):  # as PEFT does
            alpha = value
    if "alpha" in pair:
        alpha = pair["alpha"].item() if pair["alpha"].numel() == 1 else None
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise D3POError(f"{whose}: the alpha of {name} is {str(alpha)[:60]}; expected a number")
    return float(alpha) / (math.sqrt(rank) if said.get("use_rslora") else rank)


def _part_of(whose: str, name: str, pair: Mapping[str, torch.Tensor], scale: float, place: Place) -> Layer | None:
    """Return the LoRA of one of our layers in a file's layer; None if a joined one adds nothing to it."""
    down, up = pair["down"], pair["up"]
    whole = place.first + place.rows
    if up.shape[0] < whole or up.ndim < 2 or up.shape[1] != len(down) or (not place.joined and up.shape[0] != whole):
        raise D3POError(f"{whose}: {name} has the shapes {tuple(down.shape)} and {tuple(up.shape)}; expected up to "
                        f"{place.rows} rows for {place.layer} of model.path: is it a LoRA of that model?")  # fmt: skip
    up = up[place.first : whole]
    if place.joined:  # ranks side by side, and zeros where a layer has none
        used = up.flatten(2).any(-1).any(0) if up.ndim > 2 else up.any(0)
        if not used.any():
            return None
        up, down = up[:, used], down[used]
    return Layer(down.contiguous(), up.contiguous(), scale)
