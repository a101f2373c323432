"""A round of a campaign that goes on from a LoRA, continued or merged: made again, exported, loaded by diffusers."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from d3po.loading import load_pipeline
from d3po.tasks.judging import _derive, _judge
from d3po.tasks.sampling import _sample
from d3po.tasks.training import _train
from d3po_core.config import CampaignConfig, ModelConfig
from d3po_core.config_values import load_config
from d3po_core.errors import D3POError
from d3po_core.export.lora import export_lora
from d3po_core.models.loaded import load_policy, policy_at
from d3po_core.models.policy import Policy
from d3po_core.models.weights import loading_line
from d3po_core.paths import resolve_path
from d3po_core.processes.parcel import letter, model_places, read_letter
from d3po_core.reproducing.frozen import freeze
from d3po_core.reproducing.regenerate import regenerate
from d3po_core.reproducing.replay import replay_round
from d3po_core.seeds import gaussian
from d3po_core.store.campaign import begin_round, check_fits, open_campaign
from tests.core.sampling.drawing import stir_lora
from tests.tasks.conftest import HELD_OUT, TRAIN, evaluate_and_publish, settings_in

WAYS = ("continue", "merge")


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of the embedded model that changes what it draws."""
    policy = load_policy(ModelConfig(device="cpu", lora_rank=4), seed=3)
    stir_lora(policy, seed=4, size=0.05)
    policy.weights.save(tmp_path_factory.mktemp("style"))
    return tmp_path_factory.getbasetemp() / "style0" / "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def started(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], CampaignConfig]:
    """Campaigns of one round."""
    made: dict[str, CampaignConfig] = {}

    def of(start_as: str) -> CampaignConfig:
        if start_as not in made:
            made[start_as] = run(start_as, start, tmp_path_factory.mktemp("data"))
        return made[start_as]

    return of


def run(start_as: str, start: Path, folder: Path) -> CampaignConfig:
    values = settings_in(folder) | {"campaign": start_as}
    values["model"] |= {"start_from": str(start), "start_as": start_as}
    values["sample"] |= {"groups_per_round": 2, "group_size": 2, "num_steps": 2}
    values["train"]["reference"] = "base"
    values["evaluate"]["images_per_prompt"] = 1
    config = load_config(values, "test")
    open_campaign(config)
    freeze(config, HELD_OUT)
    for number in range(2):
        begin_round(config, number)
        if number:
            for work in (_sample, _judge, _derive, _train):
                work(config, number)
        evaluate_and_publish(config, number)
    return config


def outputs(policy: Policy, network: Any = None) -> torch.Tensor:
    latent = torch.stack([gaussian(n, *policy.latent_shape) for n in range(2)])
    conditioning = policy.encode(TRAIN[:2], 1.0)
    kept, policy.network = policy.network, network or policy.network
    try:
        with torch.no_grad():
            return policy.predict(latent, torch.tensor([500, 20]), conditioning)
    finally:
        policy.network = kept


@pytest.mark.parametrize("start_as", WAYS)
def test_the_base_of_the_campaign_has_the_start(
    start_as: str, started: Callable[[str], CampaignConfig], start: Path
) -> None:
    """Round 0 draws what the embedded model with that LoRA, loaded as a checkpoint, draws."""
    config = started(start_as)
    plain = load_policy(ModelConfig(device="cpu", lora_rank=4), seed=0)
    base = outputs(plain)
    plain.weights.load(start.parent)
    wanted = outputs(plain)
    assert (wanted - base).abs().max() > 1e-2
    torch.testing.assert_close(outputs(policy_at(config, 0)), wanted, rtol=1e-4, atol=1e-5)
    with policy_at(config, 1).base():
        torch.testing.assert_close(outputs(policy_at(config, 0)), wanted, rtol=1e-4, atol=1e-5)
    assert (outputs(policy_at(config, 1)) - wanted).abs().max() > 1e-3


@pytest.mark.parametrize("start_as", WAYS)
def test_rounds_are_made_again(start_as: str, started: Callable[[str], CampaignConfig]) -> None:
    config = started(start_as)
    model = policy_at(config, 0)
    for sample in ("r0-e1", "r1-g0-m0"):
        assert regenerate(config.folder, sample, model).same_bytes
    assert replay_round(config.folder, 1, model).identical


@pytest.mark.parametrize("start_as", WAYS)
def test_the_card_says_how_to_use_the_export_and_its_lines_load_it(
    start_as: str, started: Callable[[str], CampaignConfig], start: Path, tmp_path: Path
) -> None:
    config = started(start_as)
    export_lora(config.folder, tmp_path / "lora", "1")
    card = (tmp_path / "lora" / "README.md").read_text()
    (lines,) = re.findall(r"```python\n(.*?)```", card, re.S)
    (said,) = re.findall(r"```\n\n(.*)\n", card)
    assert f"`{start.name}`" in said
    assert ("use both, each at strength 1" in said) == (start_as == "merge")
    assert "base model with the LoRA of the start | with this LoRA" in card
    details = json.loads((tmp_path / "lora" / "d3po.json").read_text())
    assert details["config"]["model"]["start_from"] == start.name
    assert details["config"]["model"]["start_as"] == start_as
    assert list(details["start_sha256"]) == [start.name]
    names: dict[str, Any] = {}
    loading = lines.partition("image = ")[0].replace(
        '"data/shapes/model"', repr(str(resolve_path("data/shapes/model")))
    )
    exec(loading.replace(f'"{start.name}"', repr(str(start))).replace('"FOLDER"', repr(str(tmp_path / "lora"))), names)
    policy = policy_at(config, 1)
    torch.testing.assert_close(outputs(policy, names["pipe"].unet), outputs(policy), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("start_as", WAYS)
def test_the_printed_line_loads_the_round(start_as: str, started: Callable[[str], CampaignConfig]) -> None:
    """As the report, MLflow and ``d3po export-lora`` print it, run on the base model."""
    config = started(start_as)
    checkpoint = config.folder / "checkpoints/round=1"
    names: dict[str, Any] = {"pipe": load_pipeline_of_the_base()}
    exec(loading_line(checkpoint, repr(str(checkpoint)), config.model), names)
    policy = policy_at(config, 1)
    torch.testing.assert_close(outputs(policy, names["pipe"].unet), outputs(policy), rtol=1e-4, atol=1e-5)


def load_pipeline_of_the_base() -> Any:
    return StableDiffusionPipeline.from_pretrained(resolve_path("data/shapes/model"), safety_checker=None)


@pytest.mark.parametrize(("start_as", "number"), [("continue", 0), ("continue", 1), ("merge", 1)])
def test_a_notebook_loads_the_round(start_as: str, number: int, started: Callable[[str], CampaignConfig]) -> None:
    config = started(start_as)
    pipeline = load_pipeline(config.folder, number)
    policy = policy_at(config, number)
    torch.testing.assert_close(outputs(policy, pipeline.unet), outputs(policy), rtol=1e-4, atol=1e-5)


def test_the_start_is_part_of_the_campaign(
    started: Callable[[str], CampaignConfig], start: Path, tmp_path: Path
) -> None:
    config = started("merge")
    other = config.model.model_copy(update={"start_as": "continue"})
    with pytest.raises(D3POError, match=r"was started with model.start_as = 'merge'"):
        check_fits(config.model_copy(update={"model": other}))
    content = start.read_bytes()
    try:
        start.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(D3POError, match=rf"{start.name} of the LoRA to start from was changed since the campaign"):
            freeze(config, HELD_OUT)
    finally:
        start.write_bytes(content)


def test_workers_get_the_start_as_they_get_the_model(
    started: Callable[[str], CampaignConfig], start: Path, tmp_path: Path
) -> None:
    config = started("continue")
    assert model_places(config)["start_from"] == start
    there = read_letter(letter(config), tmp_path, {str(start): "/elsewhere/style.safetensors"})
    assert there.model.start_from == "/elsewhere/style.safetensors"
    assert there.sha256() == config.sha256()
