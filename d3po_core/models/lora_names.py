"""Where the layers of a LoRA's file lie in a pipeline's networks, under all names that programs write."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from d3po_core.models.families import Family
from d3po_core.models.other_names import NATIVE, Blocks, first_authors_name

_Z_IMAGE = tuple(
    Blocks(block, block, {"attention.to_out.0": "attention.out"},
           {"attention.qkv": {f"attention.to_{x}": 1 for x in "qkv"}})
    for block in ("layers", "noise_refiner", "context_refiner")
)  # fmt: skip
AUTHORS = {**NATIVE, "ZImagePipeline": _Z_IMAGE}
# kohya's prefixes of the text encoders; the second one of FLUX.1 and the third of Stable Diffusion 3 is T5.
_TEXT = {"text_encoder": ("lora_te_", "lora_te1_"), "text_encoder_2": ("lora_te2_", "lora_te3_"),
         "text_encoder_3": ("lora_te3_",)}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """A layer, and the rows of a file's layer that belong to it.

    Attributes:
        part: the pipeline's part.
        layer: the layer's name in it.
        first: the first row.
        rows: the number of rows.
        joined: whether the file's layer holds others too.
    """

    part: str
    layer: str
    first: int
    rows: int
    joined: bool = False


Heights = Mapping[str, Mapping[str, int]]


def places_by_name(family: type[Family], heights: Heights, layers_per_block: int) -> dict[str, list[Place]]:
    """Return where each layer's names in LoRA files lead.

    Args:
        family: the model's family.
        heights: output features of the layers that can have a LoRA, by part and layer.
        layers_per_block: the UNet's; unused for others.
    """
    found: dict[str, list[Place]] = {}
    for part, layers in heights.items():
        for layer, rows in layers.items():
            names = _network_names(family, layer, layers_per_block) if part == family.NETWORK else (
                _text_names(part, layer))  # fmt: skip
            for name in names:
                found.setdefault(name, [Place(part, layer, 0, rows)])
    network = heights.get(family.NETWORK, {})
    for theirs, ours in _joined(family, network):
        places, first = [], 0
        for layer in ours:
            places.append(Place(family.NETWORK, layer, first, network[layer], joined=True))
            first += network[layer]
        found |= dict.fromkeys(_spelled(theirs), places)
    return found


def _network_names(family: type[Family], layer: str, layers_per_block: int) -> Iterator[str]:
    ours = [layer, *([layer.removesuffix(".0")] if layer.endswith(".to_out.0") else [])]
    for name in ours:
        yield from (f"{family.NETWORK}.{name}", f"base_model.model.{name}", *_spelled(name))
    if family.FIRST_AUTHORS_NAMES:
        yield from _spelled(first_authors_name(layer, layers_per_block))
    for blocks in AUTHORS.get(family.PIPELINE.__name__, ()):
        block, _, inner = layer.removeprefix(f"{blocks.ours}.").partition(".")
        if layer.startswith(f"{blocks.ours}.") and inner in blocks.plain:
            yield from _spelled(f"{blocks.theirs}.{block}.{blocks.plain[inner]}")


def _spelled(name: str) -> tuple[str, ...]:
    flat = name.replace(".", "_")
    return (name, f"diffusion_model.{name}", f"transformer.{name}", f"lora_unet_{flat}", f"lora_transformer_{flat}")


def _text_names(part: str, layer: str) -> Iterator[str]:
    inner = layer.removeprefix("text_model.")  # some versions of transformers have it, some do not
    for name in (inner, f"text_model.{inner}"):
        yield f"{part}.{name}"
        yield from (prefix + name.replace(".", "_") for prefix in _TEXT.get(part, ()))


def _joined(family: type[Family], network: Mapping[str, int]) -> Iterator[tuple[str, list[str]]]:
    """Yield the authors' joined layers with ours in them, in order."""
    for blocks in AUTHORS.get(family.PIPELINE.__name__, ()):
        numbers = {layer.split(".")[1] for layer in network if layer.startswith(f"{blocks.ours}.")}
        for number in sorted(numbers):
            for theirs, heights in blocks.joined.items():
                ours = [f"{blocks.ours}.{number}.{inner}" for inner in heights]
                if all(layer in network for layer in ours):
                    yield f"{blocks.theirs}.{number}.{theirs}", ours
