"""A decoder's wide attention as plain products is the same attention, and others are left alone."""

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from diffusers.models.autoencoders.vae import Decoder

from d3po_core.seeds import gaussian
from d3po_core.speed.decoder_attention import attend_by_products


def decoder(width: int) -> Decoder:
    torch.manual_seed(0)
    layers = Decoder(
        in_channels=4, out_channels=3, up_block_types=("UpDecoderBlock2D",), block_out_channels=(width,),
        layers_per_block=1, norm_num_groups=8,
    )  # fmt: skip
    return layers.double().eval()


def processors(layers: Decoder) -> set[type]:
    return {type(module.processor) for module in layers.modules() if isinstance(module, Attention)}


def test_wide_heads_are_computed_by_products_and_are_the_same() -> None:
    layers, latent = decoder(512), gaussian(1, 2, 4, 6, 5).double()
    with torch.no_grad():
        expected = layers(latent)
        attend_by_products(layers, positions=30)
        found = layers(latent)
    assert processors(layers) == {AttnProcessor}
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # the softmax is in single precision


@pytest.mark.parametrize(("width", "positions"), [(256, 30), (512, 64 * 64 + 1)])
def test_narrow_heads_and_large_images_are_left_alone(width: int, positions: int) -> None:
    layers = decoder(width)
    attend_by_products(layers, positions)
    assert processors(layers) == {AttnProcessor2_0}
