"""What a model card says of a start and of a base that its lines cannot load as they are."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from d3po_core.config import CampaignConfig, ModelConfig
from d3po_core.export.base import said_of_base
from d3po_core.export.start import merging, said_of_start
from d3po_core.models.families.flux import Flux
from d3po_core.models.families.stable_diffusion import StableDiffusion
from d3po_core.models.loading import load_family
from d3po_core.seeds import gaussian
from tests.core.models.tiny_models import tiny_model


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model("sd", tmp_path_factory.mktemp("models") / "sd")


def config_of(**model: Any) -> CampaignConfig:
    return CampaignConfig(campaign="c", model=ModelConfig.model_validate({"device": "cpu", **model}))


def test_lines_merge_a_lora_that_peft_wrote(base: Path, tmp_path: Path) -> None:
    wrapped = get_peft_model(
        DiffusionPipeline.from_pretrained(base).unet, LoraConfig(r=2, lora_alpha=3, target_modules=["to_q", "to_v"])
    )
    for n, (name, weight) in enumerate(wrapped.named_parameters()):
        if "lora_" in name:
            weight.data = gaussian(n, *weight.shape)
    wrapped.save_pretrained(tmp_path / "style")
    config = config_of(path=str(base), start_from=str(tmp_path / "style"), start_as="merge")
    names: dict[str, Any] = {"pipe": DiffusionPipeline.from_pretrained(base)}
    exec(merging(config, StableDiffusion).replace('"style"', repr(str(tmp_path / "style"))), names)
    found = names["pipe"].unet.state_dict()
    for name, value in load_family(config.model).pipeline.unet.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("start", "line"),
    [
        ("ann/style", 'pipe.load_lora_weights("ann/style")'),
        ("ann/style/b.safetensors", 'pipe.load_lora_weights("ann/style", weight_name="b.safetensors")'),
        ("/home/ann/b.safetensors", 'pipe.load_lora_weights("b.safetensors")'),
    ],
)
def test_lines_name_the_start_as_diffusers_takes_it(start: str, line: str) -> None:
    assert line in merging(config_of(start_from=start, start_as="merge"), Flux).splitlines()
    assert merging(config_of(start_from=start), Flux) == ""
    assert merging(config_of(start_from=start, start_as="merge", train="full"), Flux) == ""
    assert merging(config_of(), Flux) == ""


def test_the_card_says_what_the_export_holds(tmp_path: Path) -> None:
    assert said_of_start(tmp_path, config_of(), "LoRA") == ""
    continued = said_of_start(tmp_path, config_of(start_from="ann/style"), "LoRA")
    assert "`ann/style`, which this one contains: use this one alone." in continued
    merged = config_of(start_from="ann/style", start_as="merge", train="full")
    assert "these weights contain it" in said_of_start(tmp_path, merged, "unet")


def test_a_base_that_the_lines_cannot_load_is_said(base: Path, tmp_path: Path) -> None:
    assert said_of_base(ModelConfig(path="ann/model"), StableDiffusion, "ann/model") == ""
    plain = said_of_base(ModelConfig(path=str(base)), StableDiffusion, None)
    assert "put its hub id" in plain
    assert "8 bits" not in plain
    state = load_file(base / "unet" / "diffusion_pytorch_model.safetensors")
    layer = next(name for name, value in state.items() if name.endswith("weight") and value.ndim == 2)
    state[layer] = state[layer].to(torch.float8_e4m3fn)
    save_file(state | {f"{layer}_scale": torch.tensor(1.0)}, tmp_path / "m.safetensors")
    said = said_of_base(
        ModelConfig(path=str(tmp_path / "m.safetensors"), single_file_config=str(base)), StableDiffusion, None
    )
    assert "load it with `from_single_file` of `diffusers.StableDiffusionPipeline`" in said
    assert "take the model in 16 bits" in said
