"""What a model's files say of its size, read without importing torch."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d3po_core.config import CampaignConfig, ModelConfig
from d3po_core.errors import D3POError
from d3po_core.models.places import INDEX, model_folder
from d3po_core.models.written import UNKNOWN_LATENT, UNKNOWN_PIXELS, UNKNOWN_WEIGHTS, written_bytes
from d3po_core.paths import resolve_path
from d3po_core.sizes import Grid, Size

WEIGHTS = "*.safetensors"


@dataclass(frozen=True)
class ModelFacts:
    """A model's size; None for what its files do not say, or if they are not on this machine.

    Attributes:
        family: the class of its diffusers pipeline.
        latent: shape of a latent; its last two dimensions are height and width.
        per_side: the pixel width of one latent element.
        network_bytes: size of the trained network's files.
        grid: the sizes that it draws.
        guidance: how it is guided: ``two passes``, ``told`` or ``none``.
    """

    family: str | None = None
    latent: tuple[int, ...] | None = None
    per_side: int | None = None
    network_bytes: int | None = None
    grid: Grid | None = None
    guidance: str | None = None

    @property
    def native(self) -> Size | None:
        """Return the size that the network was trained with."""
        if not self.latent or not self.per_side:
            return None
        height, width = (side * self.per_side for side in self.latent[-2:])
        return height, width


# By pipeline, how a transformer's file gives its latents: channels if it names none, how many of them make one of a
# latent, the native side, and stored elements per side of a latent of the VAE.
TRANSFORMERS = {
    "StableDiffusion3Pipeline": (16, 1, 128, 1), "FluxPipeline": (64, 4, 128, 1), "QwenImagePipeline": (64, 4, 128, 1),
    "ZImagePipeline": (16, 1, 128, 1), "SanaPipeline": (32, 1, 32, 1), "Flux2KleinPipeline": (128, 1, 128, 2),
}  # fmt: skip
# By pipeline, the stored elements per side of the smallest piece that the network takes, if not 1.
PATCHES = {"StableDiffusion3Pipeline": 2, "FluxPipeline": 2, "QwenImagePipeline": 2, "ZImagePipeline": 2}
# The presets' models, for a plan made before they are downloaded.
PUBLISHED = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": ModelFacts(
        "StableDiffusionPipeline", (4, 64, 64), 8, grid=Grid("StableDiffusionPipeline", 8), guidance="two passes"
    ),
    "stabilityai/stable-diffusion-xl-base-1.0": ModelFacts(
        "StableDiffusionXLPipeline", (4, 128, 128), 8, grid=Grid("StableDiffusionXLPipeline", 8), guidance="two passes"
    ),
}


def facts_of(config: ModelConfig) -> ModelFacts:
    """Return what a model's files say of its size.

    Raises:
        D3POError: a file is damaged.
    """
    described_by = config.single_file_config or config.path
    folder = model_folder(config)
    if folder is None or folder.is_file():
        return PUBLISHED.get(described_by, ModelFacts())
    if not resolve_path(described_by).exists() and not (folder / "vae" / "config.json").exists():
        return PUBLISHED.get(described_by, ModelFacts())  # its download was cut off
    index = read_json(config, folder / INDEX)
    part = "transformer" if "transformer" in index else "unet"
    network, vae = (read_json(config, folder / name / "config.json") for name in (part, "vae"))
    files = list((folder / part).glob(WEIGHTS))
    variant = [file for file in files if config.variant and f".{config.variant}" in file.stem]
    family = str(index.get("_class_name"))
    per_side = _per_side(vae, family)
    return ModelFacts(
        family=index.get("_class_name"),
        latent=_latent(network, family),
        per_side=per_side,
        network_bytes=sum(file.stat().st_size for file in variant or files if file.exists()) or None,
        grid=_grid(network, family, per_side),
        guidance=_guidance(network, index, family),
    )


def _grid(network: dict[str, Any], family: str, per_side: int) -> Grid:
    step = per_side * PATCHES.get(family, 1)
    places = network.get("pos_embed_max_size", 96) if family == "StableDiffusion3Pipeline" else None
    return Grid(family, step, step * places if isinstance(places, int) else None)


def _guidance(network: dict[str, Any], index: dict[str, Any], family: str) -> str:
    if family == "FluxPipeline":
        return "told" if network.get("guidance_embeds") else "none"
    return "none" if family == "Flux2KleinPipeline" and index.get("is_distilled") else "two passes"


def _latent(network: dict[str, Any], family: str) -> tuple[int, ...] | None:
    """Return a network's latent shape; diffusers' own defaults stand for fields that its file omits."""
    channels, joined, native, patch = TRANSFORMERS.get(family, (4, 1, None, 1))
    size = network.get("sample_size", native)
    sides = (size, size) if isinstance(size, int) else size
    if not sides or len(sides) != 2:
        return None
    return (network.get("in_channels", channels) // joined, *(side // patch for side in sides))


def _per_side(vae: dict[str, Any], family: str) -> int:
    """Return the pixel width of one stored latent element."""
    halvings = len(vae.get("temperal_downsample", ())) or (
        len(vae.get("encoder_block_out_channels", vae.get("block_out_channels", (0,)))) - 1
    )
    *_, patch = TRANSFORMERS.get(family, (1,))
    return int(2**halvings) * patch


def read_json(config: ModelConfig, path: Path) -> dict[str, Any]:
    """Return a mapping from one of the model's JSON files; D3POError if it cannot be read."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        name = path.name if path.name == INDEX else f"{path.parent.name}/{path.name}"
        said = "is missing" if isinstance(error, FileNotFoundError) else f"is not JSON ({error})"
        raise D3POError(
            f"model.path {config.path!r}: {name} {said}; expected a diffusers pipeline folder, written by "
            "pipe.save_pretrained"
        ) from None
    return found if isinstance(found, dict) else {}


def disk_bytes(config: CampaignConfig, facts: ModelFacts) -> int:
    """Estimate the bytes that a round writes; an unknown model counts as Stable Diffusion 1.5."""
    trained = 0
    if config.model.train == "full":
        width = 2 if config.model.variant == "fp16" else 4
        trained = facts.network_bytes // width if facts.network_bytes else UNKNOWN_WEIGHTS
    return written_bytes(config, facts.latent or UNKNOWN_LATENT, facts.per_side or UNKNOWN_PIXELS, trained)
