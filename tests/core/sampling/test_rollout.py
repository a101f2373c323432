"""Sampling and replay on the embedded model, against diffusers' own pipeline."""

import contextlib

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from hypothesis import given
from hypothesis import strategies as st

from d3po_core.config import ModelConfig
from d3po_core.denoising.ddim import step_mean
from d3po_core.models.policy import Policy
from d3po_core.sampling.drift import kl_from_base
from d3po_core.sampling.rollout import Trajectories, replay_steps, sample_trajectories
from d3po_core.seeds import GaussianSteps, ImageSeed, derive_seed, gaussian, permutation
from tests.core.sampling.drawing import image_seed

PROMPTS = (
    "a red circle on a gray background",
    "a blue cross on a white background",
    "a yellow square on a black background",
)
NUM_STEPS = 6
DTYPES = (torch.float32, torch.float16)


SEEDS = [image_seed(prompt, member) for prompt in PROMPTS for member in range(3)]


def sample(policy: Policy, seeds: list[ImageSeed], guidance: float, dtype: torch.dtype) -> Trajectories:
    return sample_trajectories(policy, policy.schedule(NUM_STEPS, 1.0), seeds, guidance, dtype)


def replay(policy: Policy, seeds: list[ImageSeed], drawn: Trajectories, step: int, guidance: float) -> torch.Tensor:
    with torch.no_grad():
        return replay_steps(
            policy,
            policy.schedule(NUM_STEPS, 1.0),
            [seed.prompt for seed in seeds],
            drawn.latents_BTCHW[:, step],
            drawn.latents_BTCHW[:, step + 1],
            torch.full((len(seeds),), step),
            guidance,
        )[0]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_trajectory_does_not_depend_on_batch_size_or_order(stirred: Policy, guidance: float, batch_size: int) -> None:
    whole = sample(stirred, SEEDS, guidance, torch.float32)
    order = permutation(7, len(SEEDS))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        drawn = sample(stirred, [SEEDS[i] for i in chosen], guidance, torch.float32)
        assert torch.equal(drawn.latents_BTCHW[:, 0], whole.latents_BTCHW[chosen, 0])
        torch.testing.assert_close(drawn.latents_BTCHW, whole.latents_BTCHW[chosen], rtol=0, atol=1e-4)
        torch.testing.assert_close(drawn.log_probs_BT, whole.log_probs_BT[chosen], rtol=0, atol=1e-4)


def test_image_does_not_depend_on_batch_size(stirred: Policy) -> None:
    whole = stirred.decode(sample(stirred, SEEDS, 1.0, torch.float32).latents_BTCHW[:, -1])
    alone = stirred.decode(sample(stirred, SEEDS[4:5], 1.0, torch.float32).latents_BTCHW[:, -1])[0]
    assert np.abs(whole[4].astype(int) - alone.astype(int)).max() <= 1


def test_equal_seeds_give_equal_trajectories_bit_for_bit(stirred: Policy) -> None:
    first, second = (sample(stirred, SEEDS, 1.0, torch.float32) for _ in range(2))
    assert torch.equal(first.latents_BTCHW, second.latents_BTCHW)
    assert torch.equal(first.log_probs_BT, second.log_probs_BT)


def test_global_random_state_neither_matters_nor_moves(policy: Policy) -> None:
    torch.manual_seed(1)
    first = sample(policy, SEEDS[:2], 1.0, torch.float32)
    after_first = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after_first)
    torch.manual_seed(2)
    assert torch.equal(sample(policy, SEEDS[:2], 1.0, torch.float32).latents_BTCHW, first.latents_BTCHW)


def test_members_share_the_initial_latent_and_nothing_after_it(policy: Policy) -> None:
    latents = sample(policy, SEEDS, 1.0, torch.float32).latents_BTCHW.unflatten(0, (3, 3))
    for group in latents:
        assert all(torch.equal(member[0], group[0, 0]) for member in group)
        assert not torch.allclose(group[0, 1], group[1, 1], atol=1e-2)
    assert not torch.allclose(latents[0, 0, 0], latents[1, 0, 0], atol=1e-2)


def test_noise_of_a_step_is_what_the_seed_says(policy: Policy) -> None:
    """Sampled minus mean over sigma gives back the seeded noise, so log_prob is that of the noise."""
    schedule = policy.schedule(NUM_STEPS, 1.0)
    drawn = sample(policy, SEEDS[:1], 1.0, torch.float32)
    noise_TCHW = gaussian(SEEDS[0].noise_seed, NUM_STEPS, *policy.latent_shape).double()
    standard = torch.distributions.Normal(0.0, 1.0)
    expected = standard.log_prob(noise_TCHW).mean(dim=(1, 2, 3)) - schedule.sigma_T.double().log()
    torch.testing.assert_close(drawn.log_probs_BT[0].double(), expected, rtol=0, atol=1e-4)


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3), st.sampled_from(PROMPTS), st.integers(0, 3)), unique=True)
)
def test_seeds_of_different_images_differ(keys: list[tuple[int, int, str, int]]) -> None:
    seeds = [derive_seed(*key) for key in keys]
    assert len(set(seeds)) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_replayed_log_prob_equals_stored_at_the_same_batch(
    stirred: Policy, dtype: torch.dtype, guidance: float
) -> None:
    drawn = sample(stirred, SEEDS, guidance, dtype)
    assert drawn.latents_BTCHW.dtype == dtype
    assert drawn.log_probs_BT.dtype == torch.float32
    for step in range(NUM_STEPS):
        with stirred.merged():
            assert torch.equal(replay(stirred, SEEDS, drawn, step, guidance), drawn.log_probs_BT[:, step])
        # As training computes it, with the LoRA apart from the base weights.
        torch.testing.assert_close(
            replay(stirred, SEEDS, drawn, step, guidance), drawn.log_probs_BT[:, step], atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_replayed_log_prob_equals_stored_at_another_batch_size(
    stirred: Policy, dtype: torch.dtype, guidance: float
) -> None:
    drawn = sample(stirred, SEEDS, guidance, dtype)
    alone = Trajectories(drawn.latents_BTCHW[4:5], drawn.log_probs_BT[4:5])
    for step in range(NUM_STEPS):
        replayed = replay(stirred, SEEDS[4:5], alone, step, guidance)
        torch.testing.assert_close(replayed, alone.log_probs_BT[:, step], rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_at_different_steps_replay_together(stirred: Policy, dtype: torch.dtype) -> None:
    drawn = sample(stirred, SEEDS, 3.0, dtype)
    rows, steps = torch.cartesian_prod(torch.arange(len(SEEDS)), torch.arange(NUM_STEPS)).unbind(1)
    with torch.no_grad():
        replayed = replay_steps(
            stirred,
            stirred.schedule(NUM_STEPS, 1.0),
            [SEEDS[i].prompt for i in rows],
            drawn.latents_BTCHW[rows, steps],
            drawn.latents_BTCHW[rows, steps + 1],
            steps,
            3.0,
        )[0]
    torch.testing.assert_close(replayed.view(len(SEEDS), -1), drawn.log_probs_BT, rtol=0, atol=1e-4)


def test_another_policy_gives_another_log_prob(stirred: Policy) -> None:
    drawn = sample(stirred, SEEDS, 1.0, torch.float32)
    with stirred.base():
        replayed = replay(stirred, SEEDS, drawn, 2, 1.0)
    assert (replayed - drawn.log_probs_BT[:, 2]).abs().min() > 1e-5


class NoiseGiven:
    """A stand-in for ``scheduler.step`` that enters the given noise in place of the generator's."""

    def __init__(self, scheduler: DDIMScheduler, noise_BTCHW: torch.Tensor) -> None:
        self.step, self.noise_BTCHW, self.calls = scheduler.step, noise_BTCHW, 0

    def __call__(
        self, output: torch.Tensor, t: torch.Tensor, latent: torch.Tensor, eta: float = 0.0, return_dict: bool = True
    ) -> object:
        noise = self.noise_BTCHW[:, self.calls]
        self.calls += 1
        return self.step(output, t, latent, eta=eta, variance_noise=noise, return_dict=return_dict)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_sampling_equals_diffusers_own_pipeline(
    policy: Policy, base_pipeline: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch, guidance: float
) -> None:
    ours = sample(policy, SEEDS, guidance, torch.float32)
    noise = torch.stack([gaussian(seed.noise_seed, NUM_STEPS, *policy.latent_shape) for seed in SEEDS])
    given_noise = NoiseGiven(base_pipeline.scheduler, noise)
    monkeypatch.setattr(base_pipeline.scheduler, "step", given_noise)
    path: list[torch.Tensor] = []

    def keep(pipeline: StableDiffusionPipeline, step: int, t: int, values: dict) -> dict:
        path.append(values["latents"].clone())
        return values

    result = base_pipeline(
        [seed.prompt for seed in SEEDS],
        num_inference_steps=NUM_STEPS,
        guidance_scale=guidance,
        eta=1.0,
        latents=torch.stack([gaussian(seed.initial_seed, *policy.latent_shape) for seed in SEEDS]),
        output_type="np",
        callback_on_step_end=keep,
    )
    assert given_noise.calls == NUM_STEPS
    torch.testing.assert_close(ours.latents_BTCHW[:, 1:], torch.stack(path, dim=1), rtol=5e-4, atol=5e-4)
    theirs = (result.images * 255).round().astype(int)
    difference = np.abs(policy.decode(ours.latents_BTCHW[:, -1]).astype(int) - theirs)
    assert difference.max() <= 1
    assert (difference == 0).mean() > 0.99


def test_decode_equals_the_pipelines_vae(policy: Policy, base_pipeline: StableDiffusionPipeline) -> None:
    # More images than one chunk of the decoder, so that the chunks' order counts.
    latent = torch.stack([gaussian(i, *policy.latent_shape) for i in range(20)])
    decoded = policy.decode(latent)
    with torch.no_grad():
        raw = base_pipeline.vae.decode(latent / base_pipeline.vae.config.scaling_factor).sample
    theirs = np.stack([np.asarray(image) for image in base_pipeline.image_processor.postprocess(raw)])
    assert decoded.dtype == np.uint8
    assert decoded.shape == theirs.shape
    difference = np.abs(decoded.astype(int) - theirs.astype(int))
    assert difference.max() <= 1
    assert (difference == 0).mean() > 0.99


def test_step_without_noise_is_stored_with_log_prob_zero(policy: Policy) -> None:
    from d3po_core.denoising.ddim import make_schedule

    schedule = make_schedule(
        DDIMScheduler(beta_schedule="scaled_linear", set_alpha_to_one=True, clip_sample=False), NUM_STEPS, 1.0
    )
    drawn = sample_trajectories(policy, schedule, SEEDS[:2], 1.0, torch.float32)
    assert (drawn.log_probs_BT[:, -1] == 0).all()
    assert (drawn.log_probs_BT[:, :-1] != 0).all()


def test_every_step_is_reported_with_its_images(policy: Policy) -> None:
    counts: list[int] = []
    sample_trajectories(policy, policy.schedule(NUM_STEPS, 1.0), SEEDS[:2], 1.0, torch.float32, on_step=counts.append)
    assert counts == [2] * NUM_STEPS


def test_each_distinct_prompt_passes_the_text_encoder_once_and_alone(policy: Policy) -> None:
    together = policy.encode([*PROMPTS, PROMPTS[0]], 3.0)
    assert torch.equal(together.embeddings["encoder_hidden_states"][0], together.embeddings["encoder_hidden_states"][3])
    other = policy.encode([PROMPTS[2]], 1.0)
    assert torch.equal(other.embeddings["encoder_hidden_states"][0], together.embeddings["encoder_hidden_states"][2])


def test_embeddings_equal_the_pipelines(policy: Policy, base_pipeline: StableDiffusionPipeline) -> None:
    ours = policy.encode(list(PROMPTS), 3.0)
    theirs, empty = base_pipeline.encode_prompt(list(PROMPTS), "cpu", 1, do_classifier_free_guidance=True)
    torch.testing.assert_close(ours.embeddings["encoder_hidden_states"], theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.empty["encoder_hidden_states"], empty[0], rtol=1e-5, atol=1e-5)


def test_defaults_of_the_model_are_the_embedded_one(policy: Policy) -> None:
    assert policy.latent_shape == (4, 8, 8)
    assert ModelConfig().path == "data/shapes/model"


def test_merging_the_lora_leaves_every_weight_as_it_was(stirred: Policy) -> None:
    unet = stirred.family.pipeline.unet
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    with stirred.merged():
        assert any(not torch.equal(value, before[name]) for name, value in unet.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
    assert all(parameter.requires_grad for _, parameter in stirred.weights.parameters())


def test_untrained_policy_has_not_drifted(policy: Policy) -> None:
    drawn = sample(policy, SEEDS, 1.0, torch.float32)
    schedule = policy.schedule(NUM_STEPS, 1.0)
    kl_B = kl_from_base(policy, schedule, SEEDS, drawn.latents_BTCHW, 1.0, rows=4)
    torch.testing.assert_close(kl_B, torch.zeros(len(SEEDS)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_drift_is_the_kl_of_the_steps_gaussians(stirred: Policy, guidance: float) -> None:
    """Against torch's own KL of the two Gaussians, and their means from replayed log_probs of two points."""
    schedule = stirred.schedule(NUM_STEPS, 1.0)
    prompts = [seed.prompt for seed in SEEDS]
    drawn = sample(stirred, SEEDS, guidance, torch.float32)
    expected_B = torch.zeros(len(SEEDS), dtype=torch.float64)
    conditioning = stirred.encode(prompts, guidance)
    for step in range(NUM_STEPS):
        sigma = schedule.sigma_T[step].double()
        if sigma == 0:
            continue
        latent, t_B = drawn.latents_BTCHW[:, step], schedule.timesteps_T[step].repeat(len(SEEDS))
        step_B = torch.full((len(SEEDS),), step)
        normals = []
        for context in (contextlib.nullcontext(), stirred.base()):
            with torch.no_grad(), context:
                mean = step_mean(schedule, step_B, latent, stirred.predict(latent, t_B, conditioning))
            normals.append(torch.distributions.Normal(mean.double(), sigma))
        expected_B += torch.distributions.kl_divergence(*normals).mean(dim=(1, 2, 3))
    for rows in (1, len(SEEDS), 2 * len(SEEDS) + 1, 64):
        kl_B = kl_from_base(stirred, schedule, SEEDS, drawn.latents_BTCHW, guidance, rows)
        assert kl_B.min() > 0
        torch.testing.assert_close(kl_B.double(), expected_B, rtol=1e-4, atol=0)


@given(
    st.lists(st.integers(0, 2**62), min_size=1, max_size=3),
    st.sampled_from([(4, 8, 8), (4, 64, 64), (16, 2, 2), (3, 16)]),
    st.integers(1, 4),
)
def test_noise_drawn_step_by_step_is_the_noise_drawn_at_once(
    seeds: list[int], shape: tuple[int, ...], num_steps: int
) -> None:
    noise = GaussianSteps(seeds, *shape)
    drawn_TB = torch.stack([noise.next() for _ in range(num_steps)])
    for index, seed in enumerate(seeds):
        assert torch.equal(drawn_TB[:, index], gaussian(seed, num_steps, *shape))
