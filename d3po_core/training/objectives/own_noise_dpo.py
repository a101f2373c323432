"""Diffusion-DPO on the stored trajectory: the target is the noise that leads from x_0 to the stored x_t.

InPO and SmPO invert x_0 to find that noise; images that this campaign sampled have it on disk.
"""

from typing import ClassVar

from d3po_core.training.objective import Source
from d3po_core.training.objectives.diffusion_dpo import DiffusionDpo


class OwnNoiseDpo(DiffusionDpo):
    """Diffusion-DPO's loss, with target noise (x_t - signal x_0) / noise_level instead of a fresh draw."""

    source: ClassVar[Source] = "own_noise"
