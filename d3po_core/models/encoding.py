"""Encode given images with a model's VAE; the network and the text encoders are not used."""

import numpy as np
import torch

from d3po_core.config import ModelConfig
from d3po_core.devices import device_type
from d3po_core.models.loading import load_family
from d3po_core.models.written import latent_at
from d3po_core.sizes import Size

ROWS = 8  # images per pass


class Encoder:
    """A model's VAE on its device.

    Attributes:
        latent_shape: shape of one latent: channels first.
        height, width: size in pixels of the images that it takes.

    Args:
        config: the model.
        size: height and width in pixels; the network's native size by default.

    Raises:
        D3POError: the model's family does not draw this size.
    """

    def __init__(self, config: ModelConfig, size: Size | None = None) -> None:
        self._family, self._device = load_family(config), torch.device(device_type(config.device))
        pipeline = self._family.pipeline
        pipeline.vae.requires_grad_(False).eval().to(self._device)
        pixels = pipeline.vae_scale_factor * self._family.ELEMENT
        if size:
            self._family.grid.check(size, "sample.height and sample.width")
        self.latent_shape = latent_at(self._family.latent_shape, pixels, size)
        self.height, self.width = (side * pixels for side in self.latent_shape[-2:])

    @torch.no_grad()
    def __call__(self, images_BHWC: np.ndarray) -> torch.Tensor:
        """Return the latents ``[B, C, H, W]`` of uint8 images, in float32 on the CPU."""
        image_BCHW = torch.from_numpy(images_BHWC).permute(0, 3, 1, 2)
        parts = [
            self._family.encode(part.to(self._device).float() / 127.5 - 1).float().cpu()
            for part in image_BCHW.split(ROWS)
        ]
        return torch.cat(parts) if parts else torch.empty(0, *self.latent_shape)
