"""What the tests of families share about encoding: decoding is compared with diffusers' pipelines elsewhere."""

from typing import Any

import pytest
import torch

from d3po_core.models.families import Family
from d3po_core.seeds import gaussian


def check_encoding(family: Family, side: int) -> None:
    """The VAE gets back, from ``decode``, the mean that it gave to ``encode``."""
    image, vae = gaussian(0, 2, 3, side, 2 * side).clamp(-1, 1), family.pipeline.vae
    decoded: list[torch.Tensor] = []

    def keep(latent: torch.Tensor, *_: Any) -> Any:
        decoded.append(latent)
        raise StopIteration

    with torch.no_grad(), pytest.MonkeyPatch.context() as patched:
        latent = family.encode(image)
        films = image[:, :, None] if type(vae).__name__ == "AutoencoderKLQwenImage" else image
        said = vae.encode(films)
        mean = said.latent_dist.mean if hasattr(said, "latent_dist") else said.latent
        patched.setattr(vae, "decode", keep)
        with pytest.raises(StopIteration):
            family.decode(latent)
    assert latent.shape == (2, *family.latent_shape_at(side, 2 * side))
    torch.testing.assert_close(decoded[0], mean)
