"""A merged single file draws what the folder draws that it was written from; a wrong one is one line."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from d3po_core.config import CampaignConfig, ModelConfig, SampleConfig
from d3po_core.errors import D3POError
from d3po_core.models.loaded import load_policy
from d3po_core.models.policy import Policy
from d3po_core.sampling.rollout import draw_images
from tests.core.models.single_files import write_single_file
from tests.core.models.tiny_models import tiny_model
from tests.core.sampling.drawing import image_seed

SEEDS = [image_seed(prompt, member) for prompt in ("a red circle on a gray background", "a cross") for member in (0, 1)]
CONFIG = SampleConfig(num_steps=3, guidance_scale=5.0)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of every model its folder NAME, NAME.safetensors, and NAME-config: the folder without weights."""
    root = tmp_path_factory.mktemp("models")
    for name in ("sd", "sd2", "sdxl"):
        write_single_file(tiny_model(name, root / name), root / f"{name}.safetensors")
        shutil.copytree(root / name, root / f"{name}-config", ignore=shutil.ignore_patterns("*.safetensors"))
    return root


def policy(path: Path, described_by: Path | None = None, precision: str = "no") -> Policy:
    values = {"path": str(path), "single_file_config": str(described_by) if described_by else None}
    return load_policy(ModelConfig.model_validate({**values, "device": "cpu", "precision": precision}), seed=0)


@pytest.mark.parametrize(("name", "precision"), [("sd", "no"), ("sd2", "no"), ("sdxl", "no"), ("sdxl", "fp16")])
def test_single_file_draws_what_its_folder_draws(name: str, precision: str, models: Path) -> None:
    """SD 2 and XL's second encoder are in OpenCLIP's naming, the others in that of transformers."""
    drawn = [
        draw_images(loaded, CONFIG, SEEDS, torch.float32)
        for loaded in (
            policy(models / name, precision=precision),
            policy(models / f"{name}.safetensors", models / f"{name}-config", precision),
        )
    ]
    (ours, images), (theirs, others) = drawn
    # The same weights may lie otherwise aligned in memory, which some processors' kernels round otherwise.
    torch.testing.assert_close(
        ours.latents_BTCHW, theirs.latents_BTCHW, rtol=0, atol=1e-4 if precision == "no" else 0.1
    )
    assert np.abs(images.astype(int) - others).max() <= (1 if precision == "no" else 4)
    assert len({image.tobytes() for image in images}) == len(SEEDS)


def refusal(path: Path, described_by: Path) -> str:
    with pytest.raises(D3POError) as caught:
        policy(path, described_by)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    assert message.endswith("is it a whole model, made from model.single_file_config?")
    return message


@pytest.mark.parametrize(("name", "other"), [("sdxl", "sd"), ("sd", "sdxl"), ("sd2", "sd")])
def test_single_file_of_another_model_is_one_line(name: str, other: str, models: Path) -> None:
    assert "cannot be loaded" in refusal(models / f"{name}.safetensors", models / f"{other}-config")


@pytest.mark.parametrize(
    "part",
    [
        "model.diffusion_model.output_blocks.0.0.in_layers.2.weight",
        "first_stage_model.decoder.conv_in.bias",
        "first_stage_model.",
        "cond_stage_model.transformer.text_model.final_layer_norm.weight",
        "cond_stage_model.",
    ],
)
def test_single_file_without_some_of_its_weights_is_one_line(part: str, models: Path, tmp_path: Path) -> None:
    state = load_file(models / "sd.safetensors")
    rest = {name: tensor for name, tensor in state.items() if not name.startswith(part)}
    assert len(rest) < len(state)
    save_file(rest, tmp_path / "cut.safetensors")
    message = refusal(tmp_path / "cut.safetensors", models / "sd-config")
    assert "missing" in message


def test_lora_in_place_of_a_model_is_one_line(models: Path, tmp_path: Path) -> None:
    lora = policy(models / "sd").weights.save(tmp_path)
    with pytest.raises(D3POError, match=r"is a LoRA; name it as model.start_from"):
        policy(lora, models / "sd-config")


def test_space_for_a_round_is_that_of_the_folder(models: Path) -> None:
    from d3po_core.models.space import round_bytes

    folder = {"path": str(models / "sd")}
    file = {"path": str(models / "sd.safetensors"), "single_file_config": str(models / "sd-config")}
    needed = [round_bytes(CampaignConfig.model_validate({"model": model})) for model in (folder, file)]
    assert needed[0] == needed[1] < round_bytes(CampaignConfig.model_validate({"model": {"path": "some/hub-id"}}))
