"""An upsampling with the convolution behind it, as one transposed convolution, is diffusers' own layer."""

import pytest
import torch
from diffusers.models.upsampling import Upsample2D
from hypothesis import given
from hypothesis import strategies as st

from d3po_core.config import ModelConfig
from d3po_core.models.loaded import load_policy
from d3po_core.speed.folded_upsampling import FoldedUpsample, fold_upsampling


def upsampling(channels: int, out_channels: int, seed: int = 0) -> Upsample2D:
    torch.manual_seed(seed)
    layer = Upsample2D(channels, use_conv=True, out_channels=out_channels).double()
    return layer.requires_grad_(False)


@given(
    batch=st.integers(1, 3), channels=st.integers(1, 5), out_channels=st.integers(1, 5), height=st.integers(1, 6),
    width=st.integers(1, 6), seed=st.integers(0, 1000),
)  # fmt: skip
def test_value_and_gradient_are_those_of_diffusers(
    batch: int, channels: int, out_channels: int, height: int, width: int, seed: int
) -> None:
    layer = upsampling(channels, out_channels, seed)
    x = torch.randn(batch, channels, height, width, dtype=torch.float64, requires_grad=True)
    expected = layer(x)
    found = FoldedUpsample(layer)(x)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(expected)
    (wanted,) = torch.autograd.grad((expected * weights).sum(), x)
    (ours,) = torch.autograd.grad((found * weights).sum(), x)
    torch.testing.assert_close(ours, wanted)


def test_an_image_whose_sides_are_odd_comes_out_in_the_size_asked_for() -> None:
    layer = upsampling(3, 2)
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(FoldedUpsample(layer)(x, (7, 9)), layer(x, (7, 9)))


def test_weights_stay_where_they_were_in_what_is_saved() -> None:
    network = torch.nn.Sequential(upsampling(3, 3))
    before = {key: value.clone() for key, value in network.state_dict().items()}
    fold_upsampling(network)
    assert type(network[0]) is FoldedUpsample
    assert network.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize("change", ["trained", "wrapped", "strided"])
def test_other_layers_are_left_alone(change: str) -> None:
    layer = upsampling(3, 3)
    if change == "trained":
        layer.requires_grad_(True)
    elif change == "wrapped":
        layer.conv = torch.nn.Sequential(layer.conv)
    else:
        layer.conv.stride = (2, 2)
    network = torch.nn.Sequential(layer)
    fold_upsampling(network)
    assert network[0] is layer


@pytest.mark.parametrize(("settings", "in_network", "in_decoder"), [
    ({"precision": "no"}, False, False),
    ({"precision": "fp16"}, True, True),
    ({"precision": "bf16", "train": "full"}, False, True),
    ({"precision": "fp16", "lora_targets": ("to_q", "conv")}, False, True),
])  # fmt: skip
def test_a_policy_folds_in_half_precision_what_it_does_not_train(
    settings: dict[str, object], in_network: bool, in_decoder: bool
) -> None:
    policy = load_policy(ModelConfig(device="cpu", **settings), seed=0)  # type: ignore[arg-type]
    for part, folded in ((policy.network, in_network), (policy.family.pipeline.vae.decoder, in_decoder)):
        assert any(isinstance(module, FoldedUpsample) for module in part.modules()) == folded
        assert any(isinstance(module, Upsample2D) for module in part.modules()) != folded
