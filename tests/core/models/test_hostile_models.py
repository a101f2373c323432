"""Model folders that are not what they seem: each is refused in one line, before anything is sampled."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file

from d3po_core.config import ModelConfig
from d3po_core.config_values import load_config
from d3po_core.errors import D3POError
from d3po_core.models.loaded import load_policy
from d3po_core.models.loading import check_model, load_family
from d3po_core.seeds import gaussian
from tests.core.models.tiny_models import tiny_model

Change = Callable[[Path], Any]
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: tiny_model(name, root / name) for name in ("sd", "sdxl", "sd3")}


@pytest.fixture
def copied(folders: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: shutil.copytree(folders[name], tmp_path / "model")


def setting(file: str, **fields: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return change


def content(file: str, data: bytes) -> Change:
    return lambda folder: (folder / file).write_bytes(data)


def weights(file: str, edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Change:
    def change(folder: Path) -> None:
        state = {name: tensor.clone() for name, tensor in load_file(folder / file).items()}
        save_file(edit(state), folder / file, metadata={"format": "pt"})

    return change


def without(part: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    def edit(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        kept = {name: tensor for name, tensor in state.items() if part not in name}
        assert len(kept) < len(state)
        return kept

    return edit


def poisoned(value: float) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    def edit(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        state[sorted(state)[3]].view(-1)[0] = value
        return state

    return edit


def only_bin(folder: Path) -> None:
    (folder / UNET).rename(folder / "unet/diffusion_pytorch_model.bin")


DEEP = ("[" * 20_000 + "]" * 20_000).encode()
REFUSED: dict[str, tuple[str, Change, str]] = {
    "class is a list": ("sd", setting("model_index.json", _class_name=["x"]), "expected one of StableDiffusion"),
    "class is nested": ("sd", setting("model_index.json", _class_name={"a": {"b": 1}}), "expected one of"),
    "index is deep": ("sd", content("model_index.json", DEEP), "model_index.json is not JSON"),
    "index is huge": ("sd", content("model_index.json", b'{"a": "' + b"x" * 5_000_000 + b'"}'), "5000009 bytes"),
    "part is null": ("sd", setting("model_index.json", unet=[None, None]), "says .* of the part unet"),
    "part is a word": ("sd", setting("model_index.json", vae="AutoencoderKL"), "says .* of the part vae"),
    "part is code of its own": ("sd", setting("model_index.json", unet=["my_code", "MyUNet"]), "code .* is never run"),
    "second tokenizer is null": ("sdxl", setting("model_index.json", tokenizer_2=[None, None]), "tokenizer_2"),
    "configuration is a list": ("sd", content("unet/config.json", b"[1, 2]"), "holds a list; expected a mapping"),
    "size is text": ("sd", setting("unet/config.json", sample_size="8"), "unet/config.json: sample_size"),
    "size is negative": ("sd", setting("unet/config.json", sample_size=-8), "unet/config.json: sample_size"),
    "size is 1e6": ("sd", setting("unet/config.json", sample_size=1_000_000), "unet/config.json: sample_size"),
    "channels are null": ("sd", setting("unet/config.json", in_channels=None), "unet/config.json: in_channels"),
    "inpainting": ("sd", setting("unet/config.json", in_channels=9), "inpainting networks .* not supported"),
    "learned variance": ("sd", setting("unet/config.json", out_channels=8), "predict a variance"),
    "told its guidance": ("sd", setting("unet/config.json", time_cond_proj_dim=256), r"distilled \(LCM\)"),
    "told a class": ("sd", setting("unet/config.json", num_class_embeds=10), "told a class"),
    "told an image": ("sdxl", setting("unet/config.json", encoder_hid_dim_type="image_proj"), "wants an image"),
    "scale is 0": ("sd", setting("vae/config.json", scaling_factor=0), "vae/config.json: scaling_factor"),
    "scale is text": ("sd", setting("vae/config.json", scaling_factor="0.18"), "vae/config.json: scaling_factor"),
    "mean without std": ("sdxl", setting("vae/config.json", latents_mean=[0.0] * 4), "expected both or neither"),
    "too few means": ("sdxl", setting("vae/config.json", latents_mean=[0.0], latents_std=[1.0]), "has 1 numbers"),
    "shift is null": ("sd3", setting("vae/config.json", shift_factor=None), "vae/config.json: shift_factor"),
    "weights do not fit": ("sd", setting("unet/config.json", cross_attention_dim=48), "cannot be loaded"),
    "field of another type": ("sd", setting("unet/config.json", freq_shift=None), "its unet fails in a first pass"),
    "text encoder too wide": ("sd3", setting("text_encoder/config.json", projection_dim=16), "missing or of another"),
    "header of 90 MB": ("sd", content(UNET, (90_000_000).to_bytes(8, "little") + b"{" + b" " * 100), "a header of"),
    "weights are cut": ("sd", lambda f: (f / UNET).write_bytes((f / UNET).read_bytes()[:-1]), "no whole safetensors"),
    "weights are a list": ("sd", content(UNET, (2).to_bytes(8, "little") + b"[]"), "its header is damaged"),
    "only a .bin": ("sd", only_bin, "unet/.* is missing.* may run code"),
    "NaN in the network": ("sd", weights(UNET, poisoned(float("nan"))), "unet: 1 of .* are NaN or infinite"),
    "infinity in the VAE": (
        "sd", weights("vae/diffusion_pytorch_model.safetensors", poisoned(float("inf"))), "vae: 1 of .* NaN or infinite"
    ),
    "NaN in an encoder": (
        "sdxl", weights("text_encoder_2/model.safetensors", poisoned(float("nan"))), "text_encoder_2: 1 of"
    ),
    "network without a weight": ("sd", weights(UNET, without("conv_in.bias")), "weights are missing|missing"),
    "VAE without weights": (
        "sd", weights("vae/diffusion_pytorch_model.safetensors", without("decoder.conv_in")), "missing"
    ),
    "encoder without its projection": (
        "sd3", weights("text_encoder/model.safetensors", without("text_projection")), "text_projection"
    ),
    "second encoder without its projection": (
        "sdxl", weights("text_encoder_2/model.safetensors", without("text_projection")), "text_projection"
    ),
    "encoder without a layer": (
        "sd", weights("text_encoder/model.safetensors", without("layers.1.mlp")), "4 weights are missing"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_a_folder_that_is_not_what_it_seems_is_refused_in_one_line(copied: Callable[[str], Path], case: str) -> None:
    name, change, message = REFUSED[case]
    folder = copied(name)
    change(folder)
    with pytest.raises(D3POError, match=message) as caught:
        load_policy(ModelConfig(path=str(folder), device="cpu", lora_rank=2), seed=0)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)
    assert len(str(caught.value)) < 800


@pytest.mark.parametrize("case", ["class is a list", "told its guidance", "header of 90 MB", "only a .bin"])
def test_what_files_say_is_known_without_loading(copied: Callable[[str], Path], case: str) -> None:
    name, change, message = REFUSED[case]
    folder = copied(name)
    change(folder)
    with pytest.raises(D3POError, match=message):
        check_model(ModelConfig(path=str(folder), device="cpu"))


def test_mean_and_deviation_of_latents_decode_as_in_the_pipeline(copied: Callable[[str], Path]) -> None:
    """Against diffusers' own pipeline, given final latents: it denoises none of its steps away."""
    folder = copied("sdxl")
    mean, std = [0.3, -0.5, 0.7, -0.9], [0.5, 2.0, 1.5, 0.8]
    setting("vae/config.json", latents_mean=mean, latents_std=std)(folder)
    family = load_family(ModelConfig(path=str(folder), device="cpu"))
    latent = gaussian(3, 2, *family.latent_shape)
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    finals: list[torch.Tensor] = []

    def take_ours(pipe: Any, step: int, t: Any, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        finals.append(latent)
        return {"latents": latent}

    theirs = pipeline(prompt=["a", "b"], num_inference_steps=1, callback_on_step_end=take_ours, output_type="pt").images
    with torch.no_grad():
        ours = (family.decode(latent) / 2 + 0.5).clamp(0, 1)
    assert finals
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (ours - (family.pipeline.vae.decode(latent / 0.18215).sample / 2 + 0.5).clamp(0, 1)).abs().max() > 0.05


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("train.adam_betas", [2, -5]), ("train.adam_betas", [1, 1]), ("sample.eta", 1e-320),
        ("sample.batch_size", 10**12), ("train.micro_batch", 10**12), ("model.lora_alpha", 1e300),
        ("train.learning_rate", 1e-300), ("train.beta", 1e300), ("sample.groups_per_round", 10**15),
        ("evaluate.images_per_prompt", 10**15), ("train.weight_decay", 1e300), ("train.epochs", 10**18),
    ],
)  # fmt: skip
def test_settings_that_could_only_fail_late_are_refused_at_once(field: str, value: Any) -> None:
    section, name = field.split(".")
    with pytest.raises(D3POError, match=f"{field} is ") as caught:
        load_config({section: {name: value}}, "test")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["a\0b/c", "~nobody-of-that-name/model"])
def test_a_path_that_cannot_be_one_is_one_line(path: str) -> None:
    with pytest.raises(D3POError, match="cannot be a path"):
        check_model(ModelConfig(path=path, device="cpu"))


def test_a_ring_of_links_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(D3POError) as caught:
        check_model(ModelConfig(path=str(tmp_path / "a"), device="cpu"))
    assert "\n" not in str(caught.value)
