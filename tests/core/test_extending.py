"""One more of each kind, from the outside, through the registry that the built-in ones use."""

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

from d3po_core.config import CampaignConfig, ModelConfig, ScoringConfig, TrainConfig
from d3po_core.errors import D3POError
from d3po_core.models.families import FAMILIES
from d3po_core.models.families.parts import Part, PlainUNet, Vae
from d3po_core.models.families.stable_diffusion import StableDiffusion
from d3po_core.models.loaded import load_policy
from d3po_core.scorers.finding import load_scorer
from d3po_core.scorers.models import MODELS, Model
from d3po_core.scorers.sources import Source
from d3po_core.training.objective import Losses, Objective, Rows
from d3po_core.training.objective import Source as ObjectiveSource
from d3po_core.training.objectives import OBJECTIVES, check_objective
from tests.core.models.tiny_models import tiny_model
from tests.core.training.test_trainer import GROUPS, NUM_STEPS, one_update, settings, training_set


class Squared(Objective):
    """IPO's loss on stored steps: the margin is to be 1 / (2 aim)."""

    source: ClassVar[ObjectiveSource] = "trajectory"
    guided: ClassVar[bool] = True
    aim: float = 1.0

    def losses(self, rows: Rows, train: TrainConfig) -> Losses:
        """Return one loss per pair."""
        ratio_R = rows.step_weight_R * (rows.log_prob_R - rows.reference_log_prob_R)
        margin_P = ratio_R[rows.winner_P] - ratio_R[rows.loser_P]
        return Losses.plain(rows.weight_P * (margin_P - 1 / (2 * self.aim)) ** 2, ratio_R)


def test_an_objective_is_one_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OBJECTIVES, "squared", Squared)
    config = settings(objective="squared", settings={"aim": 5.0})
    check_objective(CampaignConfig(train=config))
    policy = load_policy(ModelConfig(device="cpu", lora_rank=2), seed=0)
    schedule = policy.schedule(NUM_STEPS, 1.0)
    data = training_set(policy, schedule)
    update, gradient = one_update(policy, schedule, data, config)
    # The policy is still the reference: every margin is 0, and every pair's loss its weight / (2 aim) squared.
    weights = [weight for group in GROUPS for *_, weight in group.pairs]
    assert update.loss == pytest.approx(float(np.mean(weights)) / (2 * 5.0) ** 2, rel=1e-3)
    # The slope of every margin is -weight / aim there; that of D3PO without a clamp is -weight * beta / 2.
    _, of_d3po = one_update(policy, schedule, data, settings(beta=5.0, clip="none"))
    for name, value in gradient.items():
        torch.testing.assert_close(value, of_d3po[name] * (1 / 5.0) / (5.0 / 2), rtol=2e-3, atol=1e-9)


def test_an_objective_that_is_none_is_one_line() -> None:
    with pytest.raises(D3POError, match=r"train.objective is 'no such'; expected one of .*d3po"):
        check_objective(CampaignConfig(train=settings(objective="no such")))


class Painter(DiffusionPipeline):
    """A pipeline that no library knows: its network has a name of its own."""

    def __init__(
        self, painter: UNet2DConditionModel, vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer,
        scheduler: DDIMScheduler,
    ) -> None:  # fmt: skip
        super().__init__()
        self.register_modules(
            painter=painter, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, scheduler=scheduler
        )


class PainterFamily(StableDiffusion):
    """Words are padded with nothing, and the network paints the negative of what it is asked for."""

    PIPELINE: ClassVar[Any] = Painter
    NETWORK: ClassVar[str] = "painter"
    PARTS: ClassVar[dict[str, type[Part]]] = {"painter": PlainUNet, "vae": Vae}
    LEFT_OUT: ClassVar[dict[str, Any]] = {}
    TEXT_STATES: ClassVar[str] = "words"

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return (4, 8, 8)

    def embed(self, prompt: str, device: torch.device) -> dict[str, torch.Tensor]:
        ids = self.pipeline.tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids.to(device)
        return {"words": self.pipeline.text_encoder(ids)[0][0]}

    def predict(
        self, network: torch.nn.Module, latent_BCHW: torch.Tensor, t_B: torch.Tensor,
        embeddings: dict[str, torch.Tensor],
    ) -> torch.Tensor:  # fmt: skip
        return -network(-latent_BCHW, t_B, embeddings["words"]).sample


def test_a_family_is_a_class_and_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = DiffusionPipeline.from_pretrained(tiny_model("sd", tmp_path / "sd"), safety_checker=None)
    parts = {name: getattr(known, name) for name in ("vae", "text_encoder", "tokenizer", "scheduler")}
    Painter(painter=known.unet, **parts).save_pretrained(tmp_path / "painter")
    config = ModelConfig(path=str(tmp_path / "painter"), device="cpu", lora_rank=2)
    with pytest.raises(D3POError, match=r"is a Painter; expected one of StableDiffusionPipeline"):
        load_policy(config, seed=0)
    monkeypatch.setitem(FAMILIES, "Painter", PainterFamily)
    policy = load_policy(config, seed=0)
    schedule = policy.schedule(NUM_STEPS, 1.0)
    update, gradient = one_update(policy, schedule, training_set(policy, schedule), settings())
    assert update.loss == pytest.approx(float(np.mean([0.5, 1.0, 0.75])) * np.log(2), rel=1e-3)
    assert max(float(value.abs().max()) for value in gradient.values()) > 0
    # An independent way to the same network's output: the negative of what the known pipeline's network says.
    latent, t = torch.ones(1, 4, 8, 8), torch.tensor([500])
    words = known.encode_prompt("a red circle", "cpu", 1, do_classifier_free_guidance=False)[0]
    found = policy.predict(latent, t, policy.encode(["a red circle"], 1.0))
    torch.testing.assert_close(found, -known.unet(-latent, 500, words).sample, rtol=1e-4, atol=1e-4)


def test_a_scorer_is_a_function_or_a_class_and_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images, prompts = np.full((2, 4, 4, 3), (10, 20, 30), np.uint8), ["a", "b"]
    (tmp_path / "bluest.py").write_text("def blue(images, prompts):\n    return images[..., 2].mean(axis=(1, 2))\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert load_scorer("bluest:blue")(images, prompts).tolist() == [30, 30]

    class Reddest(torch.nn.Module):
        def __init__(self, source: Source, dtype: torch.dtype) -> None:
            super().__init__()
            self.scale = load_file(source.weights())["scale"].to(dtype)

        def forward(self, images: np.ndarray, prompts: list[str]) -> torch.Tensor:
            return self.scale * torch.tensor(images[..., 0].mean(axis=(1, 2)))

    save_file({"scale": torch.tensor(2.0)}, tmp_path / "model.safetensors")
    monkeypatch.setitem(MODELS, "reddest", Model("", "", (), Reddest))
    score = load_scorer("reddest", ScoringConfig(models={"reddest": str(tmp_path)}), "cpu")
    assert score(images, prompts).tolist() == [20, 20]
