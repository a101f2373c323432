"""Rounds that train the whole network: killed and resumed, published, made again, and opened with diffusers alone."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from mlflow import MlflowClient
from safetensors.torch import load_file

from d3po_core.config import CampaignConfig
from d3po_core.config_values import load_config
from d3po_core.export.lora import export_lora
from d3po_core.models.loaded import load_policy
from d3po_core.paths import PROJECT_ROOT
from d3po_core.reproducing.regenerate import regenerate
from d3po_core.reproducing.replay import replay_round
from d3po_core.seeds import evaluation_seeds, gaussian
from d3po_core.store.images import load_png
from d3po_core.store.prune import apply_prune, plan_prune
from d3po_core.store.tables import partition, read_rows
from tests.flows.test_kill import ROUNDS, SMALL, outcome

NETWORK = "unet/diffusion_pytorch_model.safetensors"
BASE = PROJECT_ROOT / "data/shapes/model"


def full(campaign: str) -> dict[str, Any]:
    train = {**SMALL["train"], "learning_rate": 1e-4, "reference": "base"}
    return {**SMALL, "campaign": campaign, "model": {"train": "full"}, "train": train}


def everything(campaign: Path) -> dict[str, Any]:
    networks = {str(path.relative_to(campaign)): path.read_bytes() for path in campaign.glob("checkpoints/*/unet/*")}
    return outcome(campaign) | networks


@pytest.fixture(scope="module")
def campaign(run_rounds: Callable[..., int], data: Path) -> Path:
    assert run_rounds(full("full"), ROUNDS) == 0
    return data / "runs" / "full"


@pytest.fixture(scope="module")
def config(campaign: Path) -> CampaignConfig:
    return load_config(json.loads((campaign / "campaign.json").read_text())["config"], "test")


def draw(pipeline: Any, prompt: str, seed: int) -> np.ndarray:
    """A held-out image by diffusers' own call, with the campaign's seeds as its noise."""
    image_seed = next(s for s in evaluation_seeds([prompt], 1, 0) if s.noise_seed == seed)
    noise = iter(gaussian(seed, 10, 4, 8, 8))
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    step = pipeline.scheduler.step
    pipeline.scheduler.step = lambda output, t, latent, **_: step(
        output, t, latent, eta=1.0, variance_noise=next(noise)[None], return_dict=False
    )
    latents = gaussian(image_seed.initial_seed, 1, 4, 8, 8)
    (image,) = pipeline(prompt, num_inference_steps=10, guidance_scale=1.0, latents=latents, output_type="np").images
    return np.asarray(image * 255).round()


def test_checkpoint_with_diffusers_gives_the_evaluated_images(campaign: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(campaign / "checkpoints/round=2/unet")
    row = read_rows(partition(campaign, "evaluations", 2) / "part.parquet")[0]
    stored = load_png(campaign / row["image_path"])
    trained = draw(StableDiffusionPipeline.from_pretrained(BASE, unet=unet), row["prompt"], row["seed"])
    assert np.abs(trained - stored).max() <= 1
    base = draw(StableDiffusionPipeline.from_pretrained(BASE), row["prompt"], row["seed"])
    assert np.abs(base - stored).max() > 1


def test_killed_run_ends_as_an_undisturbed_one(run_rounds: Callable[..., int], data: Path, campaign: Path) -> None:
    expected = everything(campaign)
    assert f"checkpoints/round=2/{NETWORK}" in expected
    commits = int((data / "full.commits").read_text())
    name = "full-killed"
    for part in (0.35, 0.55, 0.75):
        assert run_rounds(full(name), ROUNDS, kill_at=round(part * commits), after=part > 0.5) == -9
    assert run_rounds(full(name), ROUNDS) == 0
    assert everything(data / "runs" / name) == expected
    assert not list((data / "runs" / name).rglob("*.tmp"))


def test_mlflow_has_the_network_with_the_model_and_the_lines_that_load_it(campaign: Path, data: Path) -> None:
    client = MlflowClient(f"sqlite:///{data}/mlflow/mlflow.db")
    version = client.get_model_version_by_alias("d3po-full", "current")
    assert 'pipe.unet = diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet")' in version.description
    model = client.get_logged_model(version.source.removeprefix("models:/"))
    assert model.model_type == "full"
    folder = Path(model.artifact_location.removeprefix("file://"))
    assert (folder / NETWORK).read_bytes() == (campaign / "checkpoints/round=2" / NETWORK).read_bytes()


@pytest.fixture
def two_threads() -> Iterator[None]:
    """As many threads as the rounds were made with."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def test_rounds_are_made_again_also_after_pruning(campaign: Path, config: CampaignConfig, two_threads: None) -> None:
    policy = load_policy(config.model, config.seed)
    assert regenerate(campaign, "r2-g1-m1", policy).same_bytes
    assert replay_round(campaign, 2, policy).identical
    apply_prune(campaign, plan_prune(campaign))
    again = replay_round(campaign, 1, policy)
    assert again.identical
    assert again.sampled_again
    assert again.largest_move > 1e-5


def test_exported_folder_holds_the_network_and_its_card_loads_it(
    campaign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_lora(campaign, tmp_path / "export", "2")
    assert sorted(path.name for path in (tmp_path / "export").iterdir()) == ["README.md", "d3po.json", "unet"]
    card = (tmp_path / "export" / "README.md").read_text()
    assert "All weights of the unet" in card
    assert "- lora" not in card
    lines = card.split("```python\n")[1].split("image = ")[0]
    monkeypatch.chdir(PROJECT_ROOT)
    names: dict[str, Any] = {}
    exec(lines.replace("FOLDER", str(tmp_path / "export")), names)
    pipe: DiffusionPipeline = names["pipe"]
    stored = load_file(campaign / "checkpoints/round=2" / NETWORK)
    assert all(torch.equal(value, stored[name]) for name, value in pipe.unet.state_dict().items())


def test_what_is_trained_may_not_change_in_a_campaign(
    campaign: Path, run_rounds: Callable[..., int], data: Path
) -> None:
    assert run_rounds({**full("full"), "model": {}}, 1) == 3
    assert "was started with model.train = 'full' (now 'lora')" in (data / "full.message").read_text()
