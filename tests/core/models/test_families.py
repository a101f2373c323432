"""Every family of models, small and random: against the pipeline's own parts and against other derivations."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file

from d3po_core.config import ModelConfig, SampleConfig, TrainConfig
from d3po_core.errors import D3POError
from d3po_core.export.kohya import KOHYA_FILE, write_for_others
from d3po_core.models.families import FAMILIES
from d3po_core.models.families.sdxl import StableDiffusionXL
from d3po_core.models.loaded import load_policy
from d3po_core.models.policy import Policy
from d3po_core.models.weights import LORA_FILE
from d3po_core.sampling.rollout import draw_images, replay_steps, sample_trajectories
from d3po_core.seeds import gaussian
from d3po_core.training.lesson import TrainingSet
from d3po_core.training.optimizer import make_optimizer
from d3po_core.training.packing import PairedGroup
from d3po_core.training.trainer import train_updates
from tests.core.models.encoding_check import check_encoding
from tests.core.models.tiny_models import NAMES, pipeline_of, tiny_model
from tests.core.sampling.drawing import image_seed, stir_lora

PROMPTS = ["a red circle on a gray background", "a blue cross on a white background"]
STEPS, GUIDANCE = 4, 5.0
SEEDS = [image_seed(prompt, member) for prompt in PROMPTS for member in range(2)]

Loader = Callable[..., Policy]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: tiny_model(name, root / name) for name in NAMES}


@pytest.fixture(scope="module")
def policy_of(folders: dict[str, Path]) -> Loader:
    """Policies with a LoRA that matters; one a model and its settings."""
    loaded: dict[str, Policy] = {}

    def policy(name: str, **settings: Any) -> Policy:
        key = f"{name} {sorted(settings.items())}"
        if key not in loaded:
            config = ModelConfig(path=str(folders[name]), device="cpu", lora_rank=2, **settings)
            loaded[key] = load_policy(config, seed=0)
            stir_lora(loaded[key], seed=1, size=0.1)
        return loaded[key]

    return policy


def plain_output(name: str, pipeline: Any, latent: torch.Tensor, t: torch.Tensor, prompt: str) -> torch.Tensor:
    """The network called with what the pipeline's own encode_prompt gives, one image at a time, no guidance."""
    if name == "sd3":
        text, _, pooled, _ = pipeline.encode_prompt(prompt, None, None, do_classifier_free_guidance=False)
        return pipeline.transformer(latent, encoder_hidden_states=text, pooled_projections=pooled, timestep=t).sample
    if not name.startswith("sdxl"):
        text, _ = pipeline.encode_prompt(prompt, "cpu", 1, do_classifier_free_guidance=False)
        return pipeline.unet(latent, t, text).sample
    text, negative, pooled, negative_pooled = pipeline.encode_prompt(prompt or "x", do_classifier_free_guidance=True)
    if not prompt:  # what the pipeline takes when it is given no negative prompt
        text, pooled = negative, negative_pooled
    size = pipeline.default_sample_size * pipeline.vae_scale_factor
    ids = torch.tensor([[size, size, 0, 0, size, size]], dtype=text.dtype)
    return pipeline.unet(latent, t, text, added_cond_kwargs={"text_embeds": pooled, "time_ids": ids}).sample


def timesteps(policy: Policy) -> torch.Tensor:
    return policy.schedule(STEPS, 1.0).timesteps_T[:2]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_prediction_without_the_lora_is_the_pipelines(name: str, policy_of: Loader, folders: dict[str, Path]) -> None:
    policy, pipeline = policy_of(name), pipeline_of(folders[name])
    latent, t_B = torch.stack([gaussian(i, *policy.latent_shape) for i in range(2)]), timesteps(policy)
    with policy.base():
        plain = policy.predict(latent, t_B, policy.encode(PROMPTS, 1.0))
        guided = policy.predict(latent, t_B, policy.encode(PROMPTS, GUIDANCE))
    for i, prompt in enumerate(PROMPTS):
        arguments = (name, pipeline, latent[i : i + 1], t_B[i : i + 1])
        with_text, without = plain_output(*arguments, prompt), plain_output(*arguments, "")
        torch.testing.assert_close(plain[i : i + 1], with_text, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(guided[i : i + 1], without + GUIDANCE * (with_text - without), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "sd3"])
def test_sampled_latents_are_those_of_diffusers_scheduler(name: str, policy_of: Loader) -> None:
    policy = policy_of(name)
    drawn = sample_trajectories(policy, policy.schedule(STEPS, 1.0), SEEDS, GUIDANCE, torch.float32)
    scheduler = DDIMScheduler.from_config(policy.family.pipeline.scheduler.config)
    scheduler.set_timesteps(STEPS)
    conditioning = policy.encode([seed.prompt for seed in SEEDS], GUIDANCE)
    latent = torch.stack([gaussian(seed.initial_seed, *policy.latent_shape) for seed in SEEDS])
    noise = torch.stack([gaussian(seed.noise_seed, STEPS, *policy.latent_shape) for seed in SEEDS])
    for index, t in enumerate(scheduler.timesteps):
        with torch.no_grad():
            output = policy.predict(latent, t.expand(len(SEEDS)), conditioning)
        latent = scheduler.step(output, t, latent, eta=1.0, variance_noise=noise[:, index]).prev_sample
        torch.testing.assert_close(drawn.latents_BTCHW[:, index + 1], latent, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("noise_level", [0.7, 1.0])
def test_steps_of_the_flow_are_those_of_flow_grpo(noise_level: float, policy_of: Loader) -> None:
    """Its formula as its authors state it, step by step, from the scheduler's own sigmas."""
    policy = policy_of("sd3")
    schedule = policy.schedule(STEPS, noise_level)
    drawn = sample_trajectories(policy, schedule, SEEDS, GUIDANCE, torch.float32)
    scheduler = policy.family.pipeline.scheduler
    scheduler.set_timesteps(STEPS)
    sigmas = scheduler.sigmas
    conditioning = policy.encode([seed.prompt for seed in SEEDS], GUIDANCE)
    for index, t in enumerate(scheduler.timesteps):
        x, following = drawn.latents_BTCHW[:, index], drawn.latents_BTCHW[:, index + 1]
        noise = torch.stack([gaussian(seed.noise_seed, STEPS, *policy.latent_shape)[index] for seed in SEEDS])
        sigma, dt = sigmas[index], sigmas[index + 1] - sigmas[index]
        std = noise_level * (sigma / (1 - (sigmas[1] if sigma == 1 else sigma))).sqrt()
        with torch.no_grad():
            v = policy.predict(x, t.expand(len(SEEDS)), conditioning)
        drift = x * (1 + std**2 / (2 * sigma) * dt) + v * (1 + std**2 * (1 - sigma) / (2 * sigma)) * dt
        torch.testing.assert_close(following, drift + std * (-dt).sqrt() * noise, rtol=1e-3, atol=1e-3)
        density = torch.distributions.Normal(drift, std * (-dt).sqrt()).log_prob(following).mean(dim=(1, 2, 3))
        torch.testing.assert_close(drawn.log_probs_BT[:, index], density, rtol=1e-3, atol=1e-3)


def test_without_noise_a_step_of_the_flow_is_eulers(policy_of: Loader) -> None:
    """As the noise level falls to 0, the mean becomes diffusers' deterministic step."""
    schedule, scheduler = policy_of("sd3").schedule(STEPS, 1e-6), policy_of("sd3").family.pipeline.scheduler
    x, v = gaussian(1, 1, 8, 8, 8), gaussian(2, 1, 8, 8, 8)
    scheduler.set_timesteps(STEPS)
    for index, t in enumerate(scheduler.timesteps):
        x0, noise = x - scheduler.sigmas[index] * v, x + (1 - scheduler.sigmas[index]) * v
        ours = schedule.mean_x0_T[index] * x0 + schedule.mean_noise_T[index] * noise
        torch.testing.assert_close(ours, scheduler.step(v, t, x).prev_sample, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_replayed_log_probs_are_the_stored_ones(name: str, policy_of: Loader) -> None:
    policy = policy_of(name)
    schedule = policy.schedule(STEPS, 1.0)
    drawn = sample_trajectories(policy, schedule, SEEDS, GUIDANCE, torch.float16)
    for step in range(STEPS):
        now, following = drawn.latents_BTCHW[:, step], drawn.latents_BTCHW[:, step + 1]
        steps = torch.full((len(SEEDS),), step)
        with torch.no_grad():
            again = replay_steps(policy, schedule, [s.prompt for s in SEEDS], now, following, steps, GUIDANCE)[0]
        torch.testing.assert_close(again, drawn.log_probs_BT[:, step], rtol=0, atol=1e-3)


def training_set(policy: Policy) -> TrainingSet:
    drawn = sample_trajectories(policy, policy.schedule(STEPS, 1.0), SEEDS, GUIDANCE, torch.float32)
    groups = [PairedGroup((0, 1), ((0, 1, 1.0),)), PairedGroup((2, 3), ((3, 2, 0.5),))]
    return TrainingSet(
        [seed.prompt for seed in SEEDS],
        drawn.latents_BTCHW,
        drawn.log_probs_BT,
        groups,
        [seed.noise_seed for seed in SEEDS],
    )


@pytest.mark.parametrize("name", NAMES)
def test_an_update_widens_the_margin_and_moves_only_the_lora(name: str, folders: dict[str, Path]) -> None:
    policy = load_policy(ModelConfig(path=str(folders[name]), device="cpu", lora_rank=2), seed=0)
    frozen = {key: value.clone() for key, value in policy.network.state_dict().items() if "lora_" not in key}
    config = TrainConfig(learning_rate=1e-2, updates_per_round=4, epochs=4, beta=10.0)
    data, optimizer = training_set(policy), make_optimizer(policy, config)
    updates = list(train_updates(policy, optimizer, policy.schedule(STEPS, 1.0), data, config, GUIDANCE, seed=3))
    assert updates[0].margin_before == pytest.approx(0, abs=1e-3)
    assert updates[-1].margin_before > 0
    assert updates[-1].loss < updates[0].loss
    after = policy.network.state_dict()
    assert all(torch.equal(after[key], value) for key, value in frozen.items())


@pytest.mark.parametrize("name", NAMES)
def test_saved_lora_loads_into_the_pipeline_and_draws_the_same(
    name: str, policy_of: Loader, folders: dict[str, Path], tmp_path: Path
) -> None:
    policy, pipeline = policy_of(name, lora_alpha=3.0), pipeline_of(folders[name])
    policy.weights.save(tmp_path)
    assert load_file(tmp_path / LORA_FILE)
    latent, t_B = torch.stack([gaussian(i, *policy.latent_shape) for i in range(2)]), timesteps(policy)
    with torch.no_grad():
        ours = policy.predict(latent, t_B, policy.encode(PROMPTS, 1.0))
        before = plain_output(name, pipeline, latent[:1], t_B[:1], PROMPTS[0])
        pipeline.load_lora_weights(tmp_path, weight_name=LORA_FILE)
        after = plain_output(name, pipeline, latent[:1], t_B[:1], PROMPTS[0])
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(ours[:1], after, rtol=1e-4, atol=1e-4)
    policy.weights.load(tmp_path)  # and back into the policy, unchanged
    with torch.no_grad():
        assert torch.equal(policy.predict(latent, t_B, policy.encode(PROMPTS, 1.0)), ours)


@pytest.mark.parametrize("name", ["sd", "sd2", "sdxl"])
def test_file_for_other_programs_draws_what_the_lora_draws(
    name: str, policy_of: Loader, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Read back by diffusers, which takes others' names, alpha and rank as other programs do."""
    policy, pipeline = policy_of(name, lora_alpha=3.0), pipeline_of(folders[name])
    layers = 1 if name == "sdxl" else None
    written = write_for_others(policy.weights.save(tmp_path), tmp_path, rank=2, alpha=3.0, layers_per_block=layers)
    assert written.name == KOHYA_FILE
    latent, t_B = gaussian(0, 1, *policy.latent_shape), timesteps(policy)[:1]
    with torch.no_grad():
        ours = policy.predict(latent, t_B, policy.encode(PROMPTS[:1], 1.0))
        pipeline.load_lora_weights(tmp_path, weight_name=written.name)
        theirs = plain_output(name, pipeline, latent, t_B, PROMPTS[0])
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_images_of_a_latent_are_the_vaes(name: str, policy_of: Loader, folders: dict[str, Path]) -> None:
    policy, vae = policy_of(name), pipeline_of(folders[name]).vae
    latent = torch.stack([gaussian(i, *policy.latent_shape) for i in range(3)])
    shift = vae.config.shift_factor or 0
    with torch.no_grad():
        image = vae.decode(latent / vae.config.scaling_factor + shift).sample
    expected = (image.clamp(-1, 1) + 1) / 2 * 255
    assert (torch.from_numpy(policy.decode(latent)).permute(0, 3, 1, 2) - expected).abs().max() <= 0.51


@pytest.mark.parametrize("name", NAMES)
def test_an_encoded_image_is_decoded_from_the_vaes_own_latents(name: str, policy_of: Loader) -> None:
    family = policy_of(name).family
    check_encoding(family, family.latent_shape[-1] * family.pipeline.vae_scale_factor)


def test_latents_with_a_mean_and_a_deviation_are_those_of_the_vae_again() -> None:
    config = SimpleNamespace(latents_mean=[0.5, -1.0], latents_std=[2.0, 0.25], scaling_factor=0.13)
    latent = gaussian(0, 1, 2, 3, 3)
    family = StableDiffusionXL
    assert torch.allclose(family.scaled(latent, config)[0, 0], (latent[0, 0] - 0.5) / 2 * 0.13)
    torch.testing.assert_close(family.unscaled(family.scaled(latent, config), config), latent)


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3"])
@pytest.mark.parametrize("memory", ["balanced", "medium", "small"])
def test_saving_memory_changes_no_image_and_no_gradient(name: str, memory: str, policy_of: Loader) -> None:
    fast, other = policy_of(name), policy_of(name, memory=memory)
    config = SampleConfig(num_steps=STEPS, guidance_scale=GUIDANCE, batch_size=4)
    (ours, images), (theirs, others) = (draw_images(policy, config, SEEDS, torch.float32) for policy in (fast, other))
    torch.testing.assert_close(ours.latents_BTCHW, theirs.latents_BTCHW, rtol=1e-3, atol=1e-3)
    assert abs(images.astype(int) - others.astype(int)).max() <= 1
    data = training_set(fast)
    gradients = []
    for policy in (fast, other):
        still = torch.optim.SGD([p for _, p in policy.weights.parameters()], lr=0.0)
        config = TrainConfig(updates_per_round=1, max_grad_norm=1e9, beta=1.0)
        list(train_updates(policy, still, policy.schedule(STEPS, 1.0), data, config, GUIDANCE, seed=5))
        gradients.append(torch.cat([p.grad.flatten() for _, p in policy.weights.parameters()]))
    assert (gradients[0] - gradients[1]).norm() < 1e-3 * gradients[0].norm()


def test_families_are_found_by_the_folders_index(folders: dict[str, Path], tmp_path: Path) -> None:
    assert {"StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline"} <= set(FAMILIES)
    index = folders["sd"] / "model_index.json"
    other = tmp_path / "model_index.json"
    other.write_text(index.read_text().replace("StableDiffusionPipeline", "LuminaPipeline"))
    with pytest.raises(D3POError, match="is a LuminaPipeline; expected one of StableDiffusionPipeline"):
        load_policy(ModelConfig(path=str(tmp_path), device="cpu"), seed=0)


def test_a_single_file_must_be_safetensors_and_name_its_configuration(tmp_path: Path) -> None:
    for name, message in (("model.ckpt", "is a .ckpt file; expected .safetensors"),
                          ("model.safetensors", "is one file; set model.single_file_config")):  # fmt: skip
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(D3POError, match=message):
            load_policy(ModelConfig(path=str(tmp_path / name), device="cpu"), seed=0)


def test_a_hub_id_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    # The variable HF_HUB_OFFLINE, which the library reads once; without it, it tries again for half a minute.
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        D3POError, match=r"model.path 'nobody/nothing': cannot be loaded .* is the hub id right"
    ) as caught:
        load_policy(ModelConfig(path="nobody/nothing", device="cpu"), seed=0)
    assert "\n" not in str(caught.value)
