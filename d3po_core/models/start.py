"""Go on from a LoRA (``model.start_from``): continue to train it, or merge it into the base model first.

Either way the model with it is round 0, the base that rounds are compared with, and the reference.
"""

from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from huggingface_hub import HfApi, snapshot_download

from d3po_core.config import ModelConfig
from d3po_core.errors import D3POError
from d3po_core.models.families import Family
from d3po_core.models.lora_files import NAMED, Layer, Layers, lora_in, read_lora
from d3po_core.models.lora_names import places_by_name
from d3po_core.models.model_files import index_of, layers_per_block
from d3po_core.models.places import start_place
from d3po_core.models.weights import ADAPTER_CONFIG, ADAPTER_FILE, LORA_FILE

State = dict[str, torch.Tensor]


def check_start(config: ModelConfig, family: type[Family], folder: Path) -> None:
    """Check that the LoRA to go on from fits the model, before anything is loaded; it may still be on the hub.

    Raises:
        D3POError: it does not fit; one line.
    """
    place = start_place(config)
    if place is None:
        return
    parts = _empty_parts(config, family, folder)
    start = _read(config, family, parts, place)
    if config.start_as == "continue":
        _expect_fit(config, family, start, _targeted(config, parts[family.NETWORK]))
    for part, layers in start.items():
        for name, layer in layers.items():
            _expect_product(config, name, layer, parts[part].get_submodule(name).weight.shape)


def _empty_parts(config: ModelConfig, family: type[Family], folder: Path) -> dict[str, Any]:
    """Return the parts that a LoRA may change, without weights."""
    index, parts = index_of(config, folder), {}
    with init_empty_weights():
        for name in (family.NETWORK, *family.TEXT_PARTS):
            library, kind = index.get(name) or ["", ""]
            if library == "diffusers":
                network = getattr(diffusers, kind)
                parts[name] = network.from_config(network.load_config(folder / name, local_files_only=True))
            elif library == "transformers":
                described = transformers.AutoConfig.from_pretrained(folder / name, local_files_only=True)
                parts[name] = getattr(transformers, kind)(described)
    return parts


def read_start(config: ModelConfig, family: Family) -> Layers:
    """Return the layers of the LoRA to go on from, by part of the loaded pipeline; it is downloaded if need be.

    Raises:
        D3POError: it is missing, damaged, or of another model; one line.
    """
    parts = {name: getattr(family.pipeline, name, None) for name in (family.NETWORK, *family.TEXT_PARTS)}
    return _read(config, type(family), parts, start_place(config) or _downloaded(config))


def continued(config: ModelConfig, family: Family, start: Layers, initial: State) -> State:
    """Return the start as the campaign's own LoRA, under PEFT's names; its factor becomes that of the campaign.

    Args:
        config: the model's settings.
        family: the model's family.
        start: from ``read_start``.
        initial: the campaign's LoRA before training.

    Raises:
        D3POError: rank or layers differ.
    """
    own = {name.removesuffix(".lora_A.weight"): value for name, value in initial.items() if ".lora_A." in name}
    _expect_fit(config, type(family), start, list(own))
    factor = (config.lora_alpha or config.lora_rank) / config.lora_rank
    found = {}
    for name, layer in start[family.NETWORK].items():
        halves = {
            "lora_A": layer.down,
            "lora_B": layer.up if layer.scale == factor else layer.up * layer.scale / factor,
        }
        for half, value in halves.items():
            wanted = initial[f"{name}.{half}.weight"]
            if value.numel() != wanted.numel():
                raise _misfit(config, name, layer, tuple(wanted.shape))
            found[f"{name}.{half}.weight"] = value.reshape(wanted.shape).to(wanted)
    return found


def start_in_diffusers(config: ModelConfig, family: Family) -> State:
    """Return the LoRA to go on from as ``pipe.load_lora_weights`` takes it: its factor is in the weights."""
    return {
        f"{part}.{name}.lora_{half}.weight": value
        for part, layers in read_start(config, family).items()
        for name, layer in layers.items()
        for half, value in (("A", layer.down), ("B", layer.scale * layer.up))
    }


@torch.no_grad()
def merge_start(config: ModelConfig, family: Family) -> None:
    """Add the LoRA to go on from to the weights of the loaded pipeline, each rounded once.

    Raises:
        D3POError: as ``read_start``.
    """
    for part, layers in read_start(config, family).items():
        for name, layer in layers.items():
            weight = getattr(family.pipeline, part).get_submodule(name).weight
            _expect_product(config, name, layer, weight.shape)
            change = layer.scale * (layer.up.flatten(1) @ layer.down.flatten(1)).view(weight.shape)
            weight.data = (weight.float() + change).to(weight.dtype)


def _read(config: ModelConfig, family: type[Family], parts: dict[str, Any], place: Path) -> Layers:
    heights = {
        name: {layer: len(module.weight) for layer, module in part.named_modules()
               if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)}
        for name, part in parts.items() if part is not None
    }  # fmt: skip
    whose = f"model.start_from {config.start_from!r}"
    blocks = layers_per_block(config) if family.FIRST_AUTHORS_NAMES else 0
    return read_lora(whose, lora_in(whose, place), places_by_name(family, heights, blocks))


def _targeted(config: ModelConfig, network: torch.nn.Module) -> list[str]:
    """Return the layers that ``model.lora_targets`` means, as PEFT does."""
    ends = tuple(f".{target}" for target in config.lora_targets)
    return [name for name, module in network.named_modules()
            if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and f".{name}".endswith(ends)]  # fmt: skip


def _expect_fit(config: ModelConfig, family: type[Family], start: Layers, own: list[str]) -> None:
    """Check that a LoRA to continue has the rank and layers of the campaign's."""
    found = start.get(family.NETWORK, {})
    ranks = sorted({len(layer.down) for layer in found.values()})
    others = sorted(start.keys() - {family.NETWORK})
    if found.keys() == set(own) and ranks == [config.lora_rank] and not others:
        return
    more = f", and a LoRA of {' and '.join(others)}" if others else ""
    raise D3POError(
        f"model.start_from {config.start_from!r}: has rank {_listed(ranks)} on {len(found)} layers "
        f"({_listed(_targets(found))}){more}; expected model.lora_rank {config.lora_rank} on {len(own)} "
        f"({_listed(_targets(own))}): set these to its own, or model.start_as to 'merge'"
    )


def _targets(layers: Any) -> list[str]:
    """Return the ends of layers' names, as ``model.lora_targets`` has them."""
    return sorted({".".join(name.split(".")[-2 if name[-1].isdigit() else -1 :]) for name in layers})


def _listed(values: list[Any]) -> str:
    return ", ".join(map(str, values)) or "none"


def _expect_product(config: ModelConfig, name: str, layer: Layer, shape: torch.Size) -> None:
    across = layer.up.flatten(1).shape[1] == len(layer.down)
    if not across or len(layer.up) * layer.down[0].numel() != shape.numel():
        raise _misfit(config, name, layer, tuple(shape))


def _misfit(config: ModelConfig, name: str, layer: Layer, shape: tuple[int, ...]) -> D3POError:
    return D3POError(
        f"model.start_from {config.start_from!r}: its {name} has the shapes {tuple(layer.down.shape)} and "
        f"{tuple(layer.up.shape)}, which do not fit {shape} of model.path; is it a LoRA of that model?"
    )


def _downloaded(config: ModelConfig) -> Path:
    """Download the one LoRA of a hub repository, and return where it lies."""
    place = str(config.start_from)
    hub_id, name = "/".join(place.split("/")[:2]), "/".join(place.split("/")[2:])
    try:
        names = [path for path in HfApi().list_repo_files(hub_id) if path.endswith(".safetensors")]
        known = [path for path in (ADAPTER_FILE, LORA_FILE) if path in names]
        wanted = [name] if name else known[:1] or [path for path in names if "/" not in path]
        if len(wanted) != 1:
            raise D3POError(f"model.start_from {place!r}: has {len(wanted)} .safetensors files "
                            f"({_listed(wanted[:NAMED])}); name one of them: {hub_id}/FILE")  # fmt: skip
        folder = snapshot_download(hub_id, allow_patterns=[wanted[0], ADAPTER_CONFIG])
    except D3POError:
        raise
    except Exception as error:  # the hub's client raises anything
        raise D3POError(
            f"model.start_from {place!r}: cannot be downloaded ({' '.join(str(error).split())[:200]}); is the hub id "
            "right, and the network there? A folder or file works too"
        ) from None
    return Path(folder) if wanted[0] == ADAPTER_FILE else Path(folder) / wanted[0]
