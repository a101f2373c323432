"""Flow-matching families, small and random: against diffusers' pipelines, called whole, and other derivations."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file

from d3po_core.config import ModelConfig
from d3po_core.denoising.ddim import step_mean
from d3po_core.errors import D3POError
from d3po_core.models.loaded import load_policy
from d3po_core.models.policy import Policy
from d3po_core.models.weights import LORA_FILE
from d3po_core.sampling.rollout import replay_steps, sample_trajectories
from d3po_core.seeds import gaussian
from tests.core.models.tiny_flow_models import FLOW_NAMES, side_of, tiny_flow_model
from tests.core.sampling.drawing import image_seed, stir_lora

PROMPTS = ["a red circle on a gray background", "a blue cross"]
STEPS = 3
SEEDS = [image_seed(prompt, member) for prompt in PROMPTS for member in range(2)]
GUIDANCE = {"flux-schnell": 1.0, "klein": 1.0}  # others: 3.5
# The pipeline's own words for guidance, and how a batch of its latents is laid out.
CALLS: dict[str, Callable[[float], dict[str, Any]]] = {
    "flux-dev": lambda scale: {"guidance_scale": scale},
    "sd35": lambda scale: {"guidance_scale": scale},
    "qwen": lambda scale: {"true_cfg_scale": scale, "negative_prompt": [" ", " "]},
    "z-image": lambda scale: {"guidance_scale": scale - 1},
    "sana": lambda scale: {"guidance_scale": scale, "use_resolution_binning": False},
    "klein": lambda scale: {},
    "klein-base": lambda scale: {"guidance_scale": scale},
    "flux-schnell": lambda _: {"max_sequence_length": 256},
}


def guidance_of(name: str) -> float:
    return GUIDANCE.get(name, 3.5)


def pipeline_of(folder: Path) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(folder)
    if folder.name == "sana":  # Euler's steps at its solver's shift, as the model card says
        pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=pipeline.scheduler.config.flow_shift)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def laid_out(name: str, pipeline: Any, latent: torch.Tensor) -> torch.Tensor:
    """Latents as the pipeline's steps see them."""
    if name.startswith(("flux-", "qwen")):
        return pipeline._pack_latents(latent, *latent.shape)
    if name.startswith("klein"):
        return pipeline._pack_latents(latent)
    return latent


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root, made = tmp_path_factory.mktemp("flow"), dict[str, Path]()

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tiny_flow_model(name, root / name)
        return made[name]

    return folder


@pytest.fixture(scope="session")
def policy_of(folder_of: Callable[[str], Path]) -> Callable[[str], Policy]:
    """Policies with a LoRA that matters."""
    loaded: dict[str, Policy] = {}

    def policy(name: str) -> Policy:
        if name not in loaded:
            config = ModelConfig(path=str(folder_of(name)), device="cpu", lora_rank=2, lora_alpha=3.0)
            loaded[name] = load_policy(config, seed=0)
            stir_lora(loaded[name], seed=1, size=0.1)
        return loaded[name]

    return policy


def deterministic(policy: Policy, latent: torch.Tensor, prompts: list[str], guidance: float) -> torch.Tensor:
    """Our steps with hardly any noise level, and none of it drawn: Euler's."""
    schedule = policy.schedule(STEPS, 1e-5)
    conditioning = policy.encode(prompts, guidance)
    for step in range(STEPS):
        rows = torch.full((len(prompts),), step)
        with torch.no_grad():
            output = policy.predict(latent, schedule.timesteps_T[rows], conditioning)
        latent = step_mean(schedule, rows, latent, output)
    return latent


@pytest.mark.parametrize("name", FLOW_NAMES)
def test_deterministic_images_with_the_lora_are_those_of_the_pipeline(
    name: str, policy_of: Callable[[str], Policy], folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """The pipeline, called whole, loads the LoRA's file and draws from the same latents and prompts."""
    policy, pipeline = policy_of(name), pipeline_of(folder_of(name))
    guidance, pixels = guidance_of(name), 2 * side_of(name)
    latent = torch.stack([gaussian(i, *policy.latent_shape) for i in range(2)])

    def theirs() -> tuple[np.ndarray, torch.Tensor]:
        finals: list[torch.Tensor] = []
        images = pipeline(
            prompt=list(PROMPTS), height=pixels, width=pixels, num_inference_steps=STEPS, output_type="np",
            latents=latent if name.startswith("klein") else laid_out(name, pipeline, latent), **CALLS[name](guidance),
            callback_on_step_end=lambda pipe, step, t, values: finals.append(values["latents"]) or values,
        ).images  # fmt: skip
        return np.round(images * 255).astype(int), finals[-1]

    def expect_equal(final: torch.Tensor, images: np.ndarray, their_final: torch.Tensor) -> None:
        torch.testing.assert_close(laid_out(name, pipeline, final), their_final, rtol=1e-3, atol=1e-3)
        assert np.abs(policy.decode(final).astype(int) - images).max() <= 1

    ours = deterministic(policy, latent, PROMPTS, guidance)
    with policy.base():
        expect_equal(deterministic(policy, latent, PROMPTS, guidance), *theirs())
    assert load_file(policy.weights.save(tmp_path))
    pipeline.load_lora_weights(tmp_path, weight_name=LORA_FILE)
    with_lora = theirs()
    expect_equal(ours, *with_lora)
    with policy.base():
        assert (ours - deterministic(policy, latent, PROMPTS, guidance)).abs().max() > 0.005


@pytest.mark.parametrize("name", FLOW_NAMES)
def test_log_probs_are_those_of_flow_grpo_and_replay(name: str, policy_of: Callable[[str], Policy]) -> None:
    """The SDE as Flow-GRPO's authors state it, from noise levels that the scheduler's timesteps say."""
    policy, guidance, level = policy_of(name), guidance_of(name), 0.6
    schedule = policy.schedule(STEPS, level)
    drawn = sample_trajectories(policy, schedule, SEEDS, guidance, torch.float32)
    assert drawn.latents_BTCHW.shape == (len(SEEDS), STEPS + 1, *policy.latent_shape)
    prompts = [seed.prompt for seed in SEEDS]
    conditioning = policy.encode(prompts, guidance)
    sigmas = [float(t) / 1000 for t in schedule.timesteps_T] + [0.0]
    assert sigmas[0] == 1
    for index in range(STEPS):
        x, following = drawn.latents_BTCHW[:, index], drawn.latents_BTCHW[:, index + 1]
        noise = torch.stack([gaussian(seed.noise_seed, STEPS, *policy.latent_shape)[index] for seed in SEEDS])
        sigma, dt = sigmas[index], sigmas[index + 1] - sigmas[index]
        std = level * math.sqrt(sigma / (1 - (sigmas[1] if index == 0 else sigma)))
        t_B = schedule.timesteps_T[torch.full((len(SEEDS),), index)]
        with torch.no_grad():
            v = policy.predict(x, t_B, conditioning)
        drift = x * (1 + std**2 / (2 * sigma) * dt) + v * (1 + std**2 * (1 - sigma) / (2 * sigma)) * dt
        torch.testing.assert_close(following, drift + std * math.sqrt(-dt) * noise, rtol=1e-3, atol=1e-3)
        density = torch.distributions.Normal(drift, std * math.sqrt(-dt)).log_prob(following).mean(dim=(1, 2, 3))
        torch.testing.assert_close(drawn.log_probs_BT[:, index], density, rtol=1e-3, atol=1e-3)
        with torch.no_grad():
            again = replay_steps(policy, schedule, prompts, x, following, torch.full((4,), index), guidance)[0]
        torch.testing.assert_close(again, drawn.log_probs_BT[:, index], rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", FLOW_NAMES)
def test_every_layer_of_the_lora_gets_a_gradient(name: str, policy_of: Callable[[str], Policy]) -> None:
    policy = policy_of(name)
    for _, parameter in policy.weights.parameters():
        parameter.grad = None
    latent, t_B = torch.stack([gaussian(i, *policy.latent_shape) for i in range(2)]), torch.tensor([900.0, 400.0])
    policy.predict(latent, t_B, policy.encode(PROMPTS, guidance_of(name))).square().mean().backward()
    weights = policy.weights.parameters()
    assert len(weights) >= 8
    assert [name for name, value in weights if value.grad is None or not value.grad.any()] == []


def test_guidance_of_a_model_distilled_without_any_is_refused(policy_of: Callable[[str], Policy]) -> None:
    with pytest.raises(D3POError, match=r"guidance_scale is 3.5, and model.path .* takes no guidance.*set it to 1"):
        policy_of("flux-schnell").encode(PROMPTS, 3.5)
