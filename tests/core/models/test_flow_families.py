"""Flow-matching families, small and random: against diffusers' pipelines, called whole, and other derivations."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file

from d3po_core.config import ModelConfig
from d3po_core.config_values import load_config
from d3po_core.errors import D3POError
from d3po_core.models.families import FAMILIES
from d3po_core.models.loaded import load_policy
from d3po_core.models.model_files import check_folder, family_of, parts_of, with_model_defaults
from d3po_core.models.policy import Policy
from d3po_core.models.weights import LORA_FILE
from d3po_core.sampling.rollout import replay_steps, sample_trajectories
from d3po_core.seeds import gaussian
from tests.core.models.encoding_check import check_encoding
from tests.core.models.tiny_flow_models import FLOW_NAMES, side_of, tiny_flow_model
from tests.core.sampling.drawing import drawn_without_noise, image_seed, stir_lora

PROMPTS = ["a red circle on a gray background", "a blue cross"]
STEPS = 3
SEEDS = [image_seed(prompt, member) for prompt in PROMPTS for member in range(2)]
GUIDANCE = {"flux-schnell": 1.0, "klein": 1.0}  # others: 3.5
# The pipeline's own words for guidance.
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
def policy_of(folder_of: Callable[[str], Path]) -> Callable[..., Policy]:
    """Policies with a LoRA that matters."""
    loaded: dict[str, Policy] = {}

    def policy(name: str, **settings: Any) -> Policy:
        key = f"{name} {settings}"
        if key not in loaded:
            path, lora = str(folder_of(name)), {"lora_rank": 2, "lora_alpha": 3.0}
            targets = family_of(ModelConfig(path=path), folder_of(name)).LORA_TARGETS
            config = ModelConfig(path=path, device="cpu", **lora, lora_targets=targets, **settings)
            loaded[key] = load_policy(config, seed=0)
            stir_lora(loaded[key], seed=1, size=0.1)
        return loaded[key]

    return policy


def deterministic(policy: Policy, latent: torch.Tensor, prompts: list[str], guidance: float) -> torch.Tensor:
    """Our steps, Euler's."""
    return drawn_without_noise(policy, latent, prompts, guidance, STEPS)


@pytest.mark.parametrize("name", FLOW_NAMES)
def test_deterministic_images_with_the_lora_are_those_of_the_pipeline(
    name: str, policy_of: Callable[..., Policy], folder_of: Callable[[str], Path], tmp_path: Path
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
def test_log_probs_are_those_of_flow_grpo_and_replay(name: str, policy_of: Callable[..., Policy]) -> None:
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
def test_every_layer_of_the_lora_gets_a_gradient(name: str, policy_of: Callable[..., Policy]) -> None:
    policy = policy_of(name)
    for _, parameter in policy.weights.parameters():
        parameter.grad = None
    latent, t_B = torch.stack([gaussian(i, *policy.latent_shape) for i in range(2)]), torch.tensor([900.0, 400.0])
    policy.predict(latent, t_B, policy.encode(PROMPTS, guidance_of(name))).square().mean().backward()
    weights = policy.weights.parameters()
    assert len(weights) >= 8
    assert [name for name, value in weights if value.grad is None or not value.grad.any()] == []


def test_guidance_of_a_model_distilled_without_any_is_refused(policy_of: Callable[..., Policy]) -> None:
    with pytest.raises(D3POError, match=r"guidance_scale is 3.5, and model.path .* takes no guidance.*set it to 1"):
        policy_of("flux-schnell").encode(PROMPTS, 3.5)


@pytest.mark.parametrize("name", FLOW_NAMES)
def test_half_precision_and_recomputing_agree_with_single_precision(
    name: str, policy_of: Callable[..., Policy]
) -> None:
    """bfloat16 keeps 8 bits, also of the timestep and the guidance; a LoRA's gradient is compared as one vector."""
    latent, t_B = (
        torch.stack([gaussian(i, *policy_of(name).latent_shape) for i in range(2)]),
        torch.tensor([900.0, 400]),
    )
    outputs, gradients = [], []
    for settings in ({}, {"memory": "small"}, {"precision": "bf16"}):
        policy = policy_of(name, **settings)
        for _, parameter in policy.weights.parameters():
            parameter.grad = None
        outputs.append(policy.predict(latent, t_B, policy.encode(PROMPTS, guidance_of(name))))
        outputs[-1].square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for _, p in policy.weights.parameters() if p.grad is not None]))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)
    assert (gradients[1] - gradients[0]).norm() < 1e-3 * gradients[0].norm()
    assert (outputs[2] - outputs[0]).norm() < 0.05 * outputs[0].norm()
    assert torch.nn.functional.cosine_similarity(gradients[2], gradients[0], dim=0) > 0.9


Change = Callable[[Path], Any]


def setting(file: str, **fields: Any) -> Change:
    def change(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return change


def gone(name: str) -> Change:
    return lambda folder: shutil.rmtree(folder / name)


TRANSFORMER, SCHEDULER = "transformer/config.json", "scheduler/scheduler_config.json"
EULER = {"_class_name": "EulerDiscreteScheduler"}
REFUSED: dict[str, tuple[str, Change, str]] = {
    "FLUX that fills": ("flux-dev", setting(TRANSFORMER, in_channels=32, out_channels=16), "expected the same number"),
    "FLUX without T5": ("flux-dev", gone("text_encoder_2"), "text_encoder_2/.* is missing"),
    "FLUX, T5 is null": ("flux-dev", setting("model_index.json", text_encoder_2=[None, None]), "part text_encoder_2"),
    "FLUX with Euler of another kind": ("flux-dev", setting(SCHEDULER, **EULER), "other noise levels"),
    "FLUX, VAE without shift": ("flux-dev", setting("vae/config.json", shift_factor=None), "shift_factor"),
    "FLUX, odd side": ("flux-schnell", setting(TRANSFORMER, sample_size=7), "sample_size.*multiple of 2"),
    "FLUX.2 dev's network": ("klein", setting(TRANSFORMER, guidance_embeds=True), "told its guidance, as FLUX.2 dev"),
    "FLUX.2 without tokenizer": ("klein", gone("tokenizer"), "tokenizer/.* is missing"),
    "Qwen-Image for layers": ("qwen", setting(TRANSFORMER, use_layer3d_rope=True), "the network draws layers"),
    "Qwen-Image for editing": ("qwen", setting(TRANSFORMER, zero_cond_t=True), "wants an image to edit"),
    "Qwen-Image with noise of its own": ("qwen", setting(SCHEDULER, stochastic_sampling=True), "stochastic_sampling"),
    "Z-Image Omni": ("z-image", setting(TRANSFORMER, siglip_feat_dim=8), "the network wants an image"),
    "Z-Image, patches of 4": ("z-image", setting(TRANSFORMER, all_patch_size=[4]), "all_patch_size"),
    "SANA Sprint's network": ("sana", setting(TRANSFORMER, guidance_embeds=True), "as SANA Sprint does"),
    "SANA, not over a flow": ("sana", setting(SCHEDULER, use_flow_sigmas=False), "use_flow_sigmas is False"),
    "SANA with Karras's levels": ("sana", setting(SCHEDULER, use_karras_sigmas=True), "use_karras_sigmas is True"),
    "SANA Sprint's solver": ("sana", setting(SCHEDULER, _class_name="SCMScheduler"), "other noise levels"),
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(REFUSED))
def test_what_a_family_cannot_do_is_one_line_before_loading(
    case: str, folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    name, change, message = REFUSED[case]
    folder = shutil.copytree(folder_of(name), tmp_path / "model")
    change(folder)
    with pytest.raises(D3POError, match=message) as caught:
        check_folder(ModelConfig(path=str(folder), device="cpu"), folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("name", [name for name in FLOW_NAMES if name != "sd35"])
def test_what_overflows_or_is_not_verified_is_refused(name: str, folder_of: Callable[[str], Path]) -> None:
    for settings, message in (({"precision": "fp16"}, "overflows; expected 'bf16' or 'no'"),
                              ({"compile": True}, "model.compile is not verified for a")):  # fmt: skip
        config = ModelConfig(path=str(folder_of(name)), device="cpu", **settings)
        with pytest.raises(D3POError, match=message):
            check_folder(config, folder_of(name))


def test_klein_trains_its_joined_projections_unless_told_otherwise(folder_of: Callable[[str], Path]) -> None:
    values = {"model": {"path": str(folder_of("klein"))}}
    assert "to_qkv_mlp_proj" in with_model_defaults(load_config(values, "test")).model.lora_targets
    values["model"]["lora_targets"] = ["to_q"]
    assert with_model_defaults(load_config(values, "test")).model.lora_targets == ("to_q",)


@pytest.mark.parametrize("name", FLOW_NAMES)
def test_noise_level_is_the_families_own_unless_told(name: str, folder_of: Callable[[str], Path]) -> None:
    """With 28 steps 0.7, Flow-GRPO's; with few, no more than leaves no grain."""
    etas = []
    for steps in (4, 28):
        values = {"model": {"path": str(folder_of(name))}, "sample": {"num_steps": steps}}
        etas.append(with_model_defaults(load_config(values, "test")).sample.eta)
    assert 0.05 <= etas[0] < etas[1] <= 0.7


@pytest.mark.parametrize("name", FLOW_NAMES)
def test_a_model_card_calls_the_pipeline_in_its_own_words(name: str, folder_of: Callable[[str], Path]) -> None:
    config = ModelConfig(path=str(folder_of(name)))
    family = family_of(config, folder_of(name))
    network = parts_of(config, folder_of(name), family)["transformer"]
    said = eval(f"dict({family.call(guidance_of(name), 0.5, network)}{family.call_away('')})")
    wanted = CALLS[name](guidance_of(name))
    if name == "qwen":
        wanted["negative_prompt"] = " "
    said.pop("use_resolution_binning", None), wanted.pop("use_resolution_binning", None)
    assert said == (wanted or {"guidance_scale": 1.0})  # a distilled klein ignores it


@pytest.mark.parametrize("name", FLOW_NAMES)
def test_an_images_size_gives_its_latents_shape(name: str, policy_of: Callable[..., Policy]) -> None:
    """Against the VAE itself, which decodes such a latent to just this size."""
    family, side = policy_of(name).family, 2 * side_of(name)
    assert family.latent_shape_at(side, side) == family.latent_shape
    shape = family.latent_shape_at(side, 2 * side)
    with torch.no_grad():
        assert family.decode(gaussian(0, 1, *shape)).shape == (1, 3, side, 2 * side)
    with pytest.raises(D3POError, match=f"{side + 1} x {side} pixels does not fit .*; expected multiples of"):
        family.latent_shape_at(side + 1, side)


@pytest.mark.parametrize("name", FLOW_NAMES)
def test_an_encoded_image_is_decoded_from_the_vaes_own_latents(name: str, policy_of: Callable[..., Policy]) -> None:
    check_encoding(policy_of(name).family, 2 * side_of(name))


def test_weights_in_shards_and_variants_load_as_whole_ones(
    folder_of: Callable[[str], Path], policy_of: Callable[..., Policy], tmp_path: Path
) -> None:
    """As the hub has networks of many GB; text encoders may lack the variant."""
    pipeline = pipeline_of(folder_of("qwen"))
    pipeline.transformer.to(torch.bfloat16)
    shutil.copytree(folder_of("qwen"), tmp_path / "model")
    for part in ("transformer", "vae"):
        shutil.rmtree(tmp_path / "model" / part)
        getattr(pipeline, part).save_pretrained(tmp_path / "model" / part, variant="bf16", max_shard_size="60KB")
    setting(TRANSFORMER, sample_size=side_of("qwen"))(tmp_path / "model")
    pipeline.text_encoder.save_pretrained(tmp_path / "model" / "text_encoder", variant="bf16", max_shard_size="60KB")
    assert len(list((tmp_path / "model/transformer").glob("*.bf16*.safetensors"))) > 1
    sharded = load_policy(ModelConfig(path=str(tmp_path / "model"), device="cpu", variant="bf16"), seed=0)
    whole = policy_of("qwen", precision="bf16")
    latent, t_B = gaussian(0, 1, *whole.latent_shape), torch.tensor([500.0])
    with torch.no_grad(), whole.base(), sharded.base():
        ours, other = (p.predict(latent, t_B, p.encode(PROMPTS[:1], 1.0)) for p in (sharded, whole))
    assert (ours - other).norm() < 0.05 * ours.norm()


def test_every_lora_names_its_family(policy_of: Callable[..., Policy], tmp_path: Path) -> None:
    """For a model card when the base is not on this machine: by layer names, and by the published widths."""
    for name in FLOW_NAMES:
        policy = policy_of(name)
        file = policy.weights.save(tmp_path / name)
        shapes = {key: tuple(value.shape) for key, value in load_file(file).items()}
        if name == "qwen":  # told from Stable Diffusion 3 by its width
            shapes = {key: (shape[0], 3072) for key, shape in shapes.items()}
        found = [family for family in FAMILIES.values() if family.trained(shapes)]
        assert found == [type(policy.family)], name
