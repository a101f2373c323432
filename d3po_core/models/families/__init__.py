"""Families of diffusion models: all architecture-dependent code, one small module per family.

The rest of this package knows a model only as a ``Family``: the trained network, prompt embedding, prediction, decoding
of latents, and the Gaussian steps from noise to a latent. To add a family, write a module and add a line to
``FAMILIES``.
"""

from d3po_core.models.families.family import Embedding, Family, Guidance
from d3po_core.models.families.flux import Flux
from d3po_core.models.families.flux2_klein import Flux2Klein
from d3po_core.models.families.parts import Network, Part, Vae
from d3po_core.models.families.qwen_image import QwenImage
from d3po_core.models.families.sana import Sana
from d3po_core.models.families.sd3 import StableDiffusion3
from d3po_core.models.families.sdxl import StableDiffusionXL
from d3po_core.models.families.stable_diffusion import StableDiffusion
from d3po_core.models.families.z_image import ZImage

__all__ = ["FAMILIES", "Embedding", "Family", "Guidance", "Network", "Part", "Vae"]

FAMILIES: dict[str, type[Family]] = {
    family.PIPELINE.__name__: family
    for family in (
        StableDiffusion,
        StableDiffusionXL,
        StableDiffusion3,
        Flux,
        Flux2Klein,
        QwenImage,
        ZImage,
        Sana,
    )
}
