"""Other sizes than the network's and a negative prompt, on small models: against diffusers' pipelines, called whole."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from d3po_core.config import ModelConfig
from d3po_core.errors import D3POError
from d3po_core.models.asked import Asked
from d3po_core.models.loaded import load_policy
from d3po_core.models.policy import Policy
from d3po_core.planning.model_facts import facts_of
from d3po_core.sampling.rollout import replay_steps, sample_trajectories
from d3po_core.seeds import ImageSeed, gaussian
from tests.core.models.tiny_flow_models import FLOW_NAMES, tiny_flow_model
from tests.core.models.tiny_models import NAMES, pipeline_of, tiny_model
from tests.core.sampling.drawing import drawn_without_noise, stir_lora

PROMPTS = ["a red circle on a gray background", "a blue cross"]
NEGATIVE = "a yellow square on a black background"
SIZE, STEPS, GUIDANCE = (24, 40), 3, 3.5
CALLS: dict[str, dict[str, Any]] = {
    "qwen": {"true_cfg_scale": GUIDANCE},
    "z-image": {"guidance_scale": GUIDANCE - 1},
    "sana": {"guidance_scale": GUIDANCE, "use_resolution_binning": False},
}
WITH_NEGATIVE = ("sd", "sdxl", "sd3", "qwen", "z-image")

PolicyOf = Callable[..., Policy]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root, made = tmp_path_factory.mktemp("sized"), dict[str, Path]()

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = (tiny_model if name in NAMES else tiny_flow_model)(name, root / name)
        return made[name]

    return folder


@pytest.fixture(scope="module")
def policy_of(folder_of: Callable[[str], Path]) -> PolicyOf:
    loaded: dict[str, Policy] = {}

    def policy(name: str, **asked: Any) -> Policy:
        key = f"{name} {asked}"
        if key not in loaded:
            config = ModelConfig(path=str(folder_of(name)), device="cpu", lora_rank=2)
            loaded[key] = load_policy(config, seed=0, asked=Asked(**asked))
        return loaded[key]

    return policy


def latents(policy: Policy) -> torch.Tensor:
    return torch.stack([gaussian(i, *policy.latent_shape_at(SIZE)) for i in range(2)])


def drawn(policy: Policy, guidance: float) -> torch.Tensor:
    """Our final latents at the other size."""
    return drawn_without_noise(policy, latents(policy), PROMPTS, guidance, STEPS, SIZE)


def laid_out(name: str, pipeline: Any, latent: torch.Tensor) -> torch.Tensor:
    """Latents as the pipeline takes and gives them."""
    return pipeline._pack_latents(latent, *latent.shape) if name.startswith(("flux-", "qwen")) else latent


def drawn_by(name: str, pipeline: Any, latent: torch.Tensor, **more: Any) -> Any:
    call = CALLS.get(name, {"guidance_scale": GUIDANCE})
    return pipeline(
        prompt=list(PROMPTS), height=SIZE[0], width=SIZE[1], num_inference_steps=STEPS,
        latents=laid_out(name, pipeline, latent), **call, **more,
    ).images  # fmt: skip


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", "sd35", "flux-dev", "klein-base"])
def test_images_of_another_size_are_those_of_the_pipeline(
    name: str, policy_of: PolicyOf, folder_of: Callable[[str], Path]
) -> None:
    """FLUX and SD3.5 shift their noise levels by the size, and XL is told it."""
    policy = policy_of(name)
    ours = policy.decode(drawn(policy, GUIDANCE)).astype(int)
    assert ours.shape == (2, *SIZE, 3)
    theirs = drawn_by(name, pipeline_of(folder_of(name)), latents(policy), output_type="np")
    assert np.abs(ours - np.round(theirs * 255)).max() <= 1


@pytest.mark.parametrize("name", WITH_NEGATIVE)
def test_a_negative_prompt_is_the_pipelines(name: str, policy_of: PolicyOf, folder_of: Callable[[str], Path]) -> None:
    policy, pipeline = policy_of(name, negative_prompt=NEGATIVE), pipeline_of(folder_of(name))
    ours = drawn(policy, GUIDANCE)
    asked = {"negative_prompt": [NEGATIVE] * 2, "output_type": "latent"}
    theirs = drawn_by(name, pipeline, latents(policy), **asked)
    torch.testing.assert_close(laid_out(name, pipeline, ours), theirs, rtol=1e-3, atol=1e-3)
    assert (ours - drawn(policy_of(name), GUIDANCE)).abs().max() > 0.005
    # Without guidance it says nothing.
    assert torch.equal(drawn(policy, 1.0), drawn(policy_of(name), 1.0))


def test_sanas_negative_prompt_has_no_instruction(policy_of: PolicyOf, folder_of: Callable[[str], Path]) -> None:
    """Its pipeline puts a request before the prompt alone."""
    policy, pipeline = policy_of("sana", negative_prompt=NEGATIVE), pipeline_of(folder_of("sana"))
    _, _, text, mask = pipeline.encode_prompt(PROMPTS[0], True, negative_prompt=NEGATIVE, device="cpu")
    conditioning = policy.encode(PROMPTS[:1], GUIDANCE)
    torch.testing.assert_close(conditioning.empty["encoder_hidden_states"], text[0])
    torch.testing.assert_close(conditioning.empty["encoder_attention_mask"], mask[0])


@pytest.mark.parametrize(("name", "how"), [("flux-dev", "is told its guidance"), ("klein", "without guidance")])
def test_a_negative_prompt_that_cannot_be_used_is_refused(
    name: str, how: str, folder_of: Callable[[str], Path]
) -> None:
    config = ModelConfig(path=str(folder_of(name)), device="cpu")
    with pytest.raises(D3POError, match=rf"sample.negative_prompt is set, and model.path .*{how}"):
        load_policy(config, seed=0, asked=Asked(negative_prompt=NEGATIVE))


@pytest.mark.parametrize("name", ["sdxl", "flux-dev"])
def test_log_probs_of_another_size_replay(name: str, policy_of: PolicyOf) -> None:
    policy = policy_of(name, negative_prompt="" if name == "flux-dev" else NEGATIVE, sizes=(SIZE,))
    stir_lora(policy, seed=1, size=0.1)
    seeds = [ImageSeed(prompt, 3, member, SIZE) for prompt in PROMPTS for member in range(2)]
    schedule, prompts = policy.schedule(STEPS, 0.6, SIZE), [seed.prompt for seed in seeds]
    found = sample_trajectories(policy, schedule, seeds, GUIDANCE, torch.float32)
    assert found.latents_BTCHW.shape[2:] == policy.latent_shape_at(SIZE) == policy.largest_latent
    for step in range(STEPS):
        x, following = found.latents_BTCHW[:, step], found.latents_BTCHW[:, step + 1]
        with torch.no_grad():
            again = replay_steps(policy, schedule, prompts, x, following, torch.full((4,), step), GUIDANCE)[0]
        torch.testing.assert_close(again, found.log_probs_BT[:, step], rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", *FLOW_NAMES])
def test_the_grid_read_from_files_is_that_of_the_loaded_model(
    name: str, policy_of: PolicyOf, folder_of: Callable[[str], Path]
) -> None:
    facts, policy = facts_of(ModelConfig(path=str(folder_of(name)))), policy_of(name)
    assert facts.grid == policy.family.grid
    assert facts.guidance == policy.family.guidance
    assert facts.native is not None
    assert policy.latent_shape_at(facts.native) == policy.latent_shape
