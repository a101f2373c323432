"""Families of diffusion models: all that depends on a model's architecture, one small module a family.

The rest of this package knows a model only as a ``Family``: which network is trained, what a prompt becomes, what the
network predicts, what a latent shows, and which Gaussian steps lead from noise to it. Another family is another module
and a line in ``FAMILIES``.
"""

from d3po_core.models.families.family import Embedding, Family
from d3po_core.models.families.parts import Network, Part, Vae
from d3po_core.models.families.sd3 import StableDiffusion3
from d3po_core.models.families.sdxl import StableDiffusionXL
from d3po_core.models.families.stable_diffusion import StableDiffusion

__all__ = ["FAMILIES", "Embedding", "Family", "Network", "Part", "Vae"]

FAMILIES: dict[str, type[Family]] = {
    family.PIPELINE.__name__: family for family in (StableDiffusion, StableDiffusionXL, StableDiffusion3)
}
