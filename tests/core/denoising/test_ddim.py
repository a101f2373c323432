"""The step distribution against diffusers' own scheduler and torch.distributions."""

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from d3po_core.denoising.ddim import Schedule, log_prob, make_schedule, step_mean
from d3po_core.errors import D3POError

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
SPACINGS = ("leading", "trailing", "linspace")
SHAPE = (4, 8, 8)

scheduler_options = st.fixed_dictionaries(
    {
        "prediction_type": st.sampled_from(PREDICTION_TYPES),
        "set_alpha_to_one": st.booleans(),
        "steps_offset": st.sampled_from((0, 1)),
        "clip_sample": st.booleans(),
        "timestep_spacing": st.sampled_from(SPACINGS),
    }
)
# DDIM's own rule for the previous timestep, t - 1000 // T, is then the next of its list.
in_diffusers_order = scheduler_options.filter(lambda options: options["timestep_spacing"] == "leading")
etas = st.floats(0, 1, exclude_min=True)
sizeable_etas = st.floats(1e-3, 1)
lengths = st.sampled_from((2, 3, 5, 7, 10, 20, 50, 100))


def stable_diffusion_scheduler(**options: object) -> DDIMScheduler:
    defaults = {"set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False}
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return DDIMScheduler(**schedule, **(defaults | options))


def in_double(scheduler: DDIMScheduler) -> DDIMScheduler:
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = torch.as_tensor(scheduler.final_alpha_cumprod).double()
    return scheduler


def rows(seed: int, count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents, network outputs and noise."""
    return torch.randn(3, count, *SHAPE, generator=torch.Generator().manual_seed(seed)).unbind(0)


def diffusers_step(
    scheduler: DDIMScheduler, output: torch.Tensor, latent: torch.Tensor, eta: float, noise: torch.Tensor
) -> torch.Tensor:
    """One call of the reference for each row, at the row's own step."""
    return torch.cat(
        [
            scheduler.step(
                output[i : i + 1], int(t), latent[i : i + 1], eta=eta, variance_noise=noise[i : i + 1]
            ).prev_sample
            for i, t in enumerate(scheduler.timesteps)
        ]
    )


def diffusers_sigmas(scheduler: DDIMScheduler, eta: float) -> torch.Tensor:
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    return torch.stack([eta * scheduler._get_variance(t, t - stride) ** 0.5 for t in scheduler.timesteps.tolist()])


@settings(max_examples=150)
@given(in_diffusers_order, lengths, etas, st.integers(0, 2**31))
def test_mean_and_sample_agree_with_diffusers_in_fp32(options: dict, num_steps: int, eta: float, seed: int) -> None:
    schedule = make_schedule(stable_diffusion_scheduler(**options), num_steps, eta)
    reference = stable_diffusion_scheduler(**options)
    reference.set_timesteps(num_steps)
    latent, output, noise = rows(seed, num_steps)
    step_B = torch.arange(num_steps)
    mean = step_mean(schedule, step_B, latent, output)
    sample = mean + schedule.sigma_T[:, None, None, None] * noise
    assert schedule.timesteps_T.tolist() == reference.timesteps.tolist()
    assert mean.dtype == torch.float32
    expected_mean = diffusers_step(reference, output, latent, eta, torch.zeros_like(noise))
    torch.testing.assert_close(mean, expected_mean, rtol=1e-5, atol=1e-5)
    expected = diffusers_step(reference, output, latent, eta, noise)
    torch.testing.assert_close(sample, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize("set_alpha_to_one", [True, False])
@pytest.mark.parametrize("steps_offset", [0, 1])
@pytest.mark.parametrize(("spacing", "num_steps"), [("leading", 333), ("trailing", 250)])
def test_long_schedules_agree_with_diffusers_in_float64(
    prediction_type: str, set_alpha_to_one: bool, steps_offset: int, spacing: str, num_steps: int
) -> None:
    # With hundreds of steps diffusers' own fp32 is 2e-5 off its float64; ours is held against the latter.
    options = {
        "prediction_type": prediction_type, "set_alpha_to_one": set_alpha_to_one, "steps_offset": steps_offset,
        "timestep_spacing": spacing,
    }  # fmt: skip
    schedule = make_schedule(stable_diffusion_scheduler(**options), num_steps, 1.0)
    reference = in_double(stable_diffusion_scheduler(**options))
    reference.set_timesteps(num_steps)
    latent, output, noise = rows(0, num_steps)
    sample = (
        step_mean(schedule, torch.arange(num_steps), latent, output) + schedule.sigma_T[:, None, None, None] * noise
    )
    expected = diffusers_step(reference, output.double(), latent.double(), 1.0, noise.double())
    torch.testing.assert_close(sample.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("num_steps", [7, 10, 20, 61, 103])
def test_each_step_leads_to_the_noise_level_of_the_next_timestep(spacing: str, num_steps: int) -> None:
    """Of sqrt(a) x0 + sqrt(1 - a) noise the mean is of the next level, less the step's own noise: DDIM, Eq. 12."""
    scheduler = stable_diffusion_scheduler(timestep_spacing=spacing, steps_offset=0 if spacing == "trailing" else 1)
    schedule = make_schedule(scheduler, num_steps, 1.0)
    assert len(schedule.timesteps_T) == num_steps
    assert (schedule.timesteps_T.diff() < 0).all()
    assert schedule.timesteps_T.min() >= 0
    alphas = scheduler.alphas_cumprod.double()
    a_T = alphas[schedule.timesteps_T]
    next_T = torch.cat([a_T[1:], alphas[:1]])  # set_alpha_to_one is false
    x0, noise, _ = rows(0, num_steps)
    level = (slice(None), None, None, None)
    latent = a_T.sqrt()[level] * x0 + (1 - a_T).sqrt()[level] * noise
    sigma_T = ((1 - next_T) / (1 - a_T) * (1 - a_T / next_T)).clamp(min=0).sqrt()
    expected = next_T.sqrt()[level] * x0 + (1 - next_T - sigma_T**2).clamp(min=0).sqrt()[level] * noise
    found = step_mean(schedule, torch.arange(num_steps), latent, noise)
    torch.testing.assert_close(found, expected.float(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(schedule.sigma_T, sigma_T.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("betas", [[float("nan")] * 1000, [0.0] * 500 + [1.0] * 500])
def test_betas_of_no_model_are_refused(betas: list[float]) -> None:
    with pytest.raises(D3POError, match="gives no finite number for step"):
        make_schedule(stable_diffusion_scheduler(trained_betas=betas), 10, 1.0)


def test_zero_terminal_snr_agrees_with_diffusers() -> None:
    options = {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True}
    schedule = make_schedule(stable_diffusion_scheduler(**options), 10, 1.0)
    reference = in_double(stable_diffusion_scheduler(**options))
    reference.set_timesteps(10)
    latent, output, noise = rows(0, 10)
    sample = step_mean(schedule, torch.arange(10), latent, output) + schedule.sigma_T[:, None, None, None] * noise
    expected = diffusers_step(reference, output.double(), latent.double(), 1.0, noise.double())
    torch.testing.assert_close(sample.double(), expected, rtol=1e-5, atol=1e-5)


@settings(max_examples=60)
@given(in_diffusers_order, lengths, sizeable_etas, st.integers(0, 2**31))
def test_log_prob_is_the_mean_of_the_normal_density_of_diffusers_step(
    options: dict, num_steps: int, eta: float, seed: int
) -> None:
    schedule = make_schedule(stable_diffusion_scheduler(**options), num_steps, eta)
    reference = in_double(stable_diffusion_scheduler(**options))
    reference.set_timesteps(num_steps)
    latent, output, noise = rows(seed, num_steps)
    mean = diffusers_step(reference, output.double(), latent.double(), eta, torch.zeros_like(noise).double())
    sigma = diffusers_sigmas(reference, eta)
    sampled = mean + sigma[:, None, None, None] * noise
    random = sigma > 0
    expected = torch.distributions.Normal(mean[random], sigma[random, None, None, None]).log_prob(sampled[random])
    # Scored in fp32 around the exact mean: what is left is the rounding of x_{t-1} and of sigma.
    found = log_prob(sampled.float(), mean.float(), schedule.sigma_T)
    rounding = 6e-7 * mean[random].abs().amax(dim=(1, 2, 3)) / sigma[random]
    error = (found[random].double() - expected.mean(dim=(1, 2, 3))).abs()
    assert (error <= 1e-5 + rounding).all()
    assert (found[~random] == 0).all()


@settings(max_examples=60)
@given(st.floats(1e-3, 10), st.floats(-5, 5), st.integers(0, 2**31))
def test_log_prob_equals_torch_normal_in_float64(sigma: float, offset: float, seed: int) -> None:
    mean, noise, _ = rows(seed, 3)
    sigma_B = torch.full((3,), sigma)
    value = mean + sigma * (noise + offset)
    expected = torch.distributions.Normal(mean.double(), sigma_B.double()[:, None, None, None]).log_prob(value.double())
    torch.testing.assert_close(
        log_prob(value, mean, sigma_B).double(), expected.mean(dim=(1, 2, 3)), rtol=1e-5, atol=1e-5
    )


def test_rows_are_scored_at_their_own_steps_in_any_order() -> None:
    schedule = make_schedule(stable_diffusion_scheduler(), 10, 1.0)
    latent, output, _ = rows(0, 10)
    order = torch.tensor([3, 3, 9, 0, 7, 1, 8, 2, 5, 5])
    together = step_mean(schedule, order, latent, output)
    for i, step in enumerate(order.tolist()):
        alone = step_mean(schedule, torch.tensor([step]), latent[i : i + 1], output[i : i + 1])
        assert torch.equal(together[i : i + 1], alone)


def test_step_without_noise_is_not_trainable_and_scores_zero_with_zero_weight() -> None:
    schedule = make_schedule(stable_diffusion_scheduler(set_alpha_to_one=True), 10, 1.0)
    assert schedule.trainable_T.tolist() == [True] * 9 + [False]
    assert schedule.sigma_T[-1] == 0
    latent, output, noise = rows(0, 10)
    output.requires_grad_()
    scored = log_prob(noise, step_mean(schedule, torch.arange(10), latent, output), schedule.sigma_T)
    assert scored[-1] == 0
    scored.sum().backward()
    assert output.grad is not None
    assert torch.isfinite(output.grad).all()
    assert (output.grad[-1] == 0).all()
    assert (output.grad[:-1] != 0).any(dim=(1, 2, 3)).all()
    for weighting in ("none", "equal_gradient"):
        weight_T = schedule.step_weights(weighting)
        assert weight_T[-1] == 0
        assert (weight_T[:-1] > 0).all()


@settings(max_examples=60)
@given(scheduler_options, lengths, sizeable_etas, st.sampled_from(("none", "equal_gradient")))
def test_step_weights_have_mean_one_over_trainable_steps(
    options: dict, num_steps: int, eta: float, weighting: str
) -> None:
    schedule = make_schedule(stable_diffusion_scheduler(**options), num_steps, eta)
    weight_T = schedule.step_weights(weighting)
    assert weight_T[schedule.trainable_T].mean().item() == pytest.approx(1, abs=1e-5)
    assert (weight_T[~schedule.trainable_T] == 0).all()
    if weighting == "none":
        assert (weight_T[schedule.trainable_T] == 1).all()


def output_gradient_norms(schedule: Schedule, seed: int) -> torch.Tensor:
    """Norm of d log_prob / d output at every step ``[T]``, on-policy, the same noise everywhere."""
    num_steps = len(schedule.timesteps_T)
    latent, output, noise = rows(seed, num_steps)
    noise = noise[:1].expand(num_steps, -1, -1, -1)
    output = output.double().requires_grad_()
    step_B = torch.arange(num_steps)
    mean = step_mean(schedule, step_B, latent, output)
    value = (mean.double() + schedule.sigma_T[:, None, None, None] * noise).detach()
    # log_prob is a float32 function; the gradient does not suffer where z is formed from z itself.
    log_prob(mean.detach() + (value - mean.detach()), mean, schedule.sigma_T).sum().backward()
    assert output.grad is not None
    return output.grad.flatten(1).norm(dim=1)


@settings(max_examples=40)
@given(
    scheduler_options.filter(lambda options: not options["clip_sample"]),
    st.sampled_from((3, 10, 20)),
    st.floats(0.2, 1),
    st.integers(0, 2**31),
)
def test_equal_gradient_moves_the_output_equally_at_every_step(
    options: dict, num_steps: int, eta: float, seed: int
) -> None:
    schedule = make_schedule(stable_diffusion_scheduler(**options), num_steps, eta)
    norm_T = schedule.step_weights("equal_gradient") * output_gradient_norms(schedule, seed)
    equal = norm_T[schedule.trainable_T]
    torch.testing.assert_close(equal, equal.mean().expand_as(equal), rtol=2e-3, atol=0)


@pytest.mark.parametrize(("num_steps", "usual", "last_noisy"), [(20, (0.62, 1.15), 5.4), (10, (0.96, 1.33), 8.3)])
def test_last_noisy_step_of_stable_diffusion_dominates_without_weights(
    num_steps: int, usual: tuple[float, float], last_noisy: float
) -> None:
    schedule = make_schedule(stable_diffusion_scheduler(), num_steps, 1.0)
    scale_T = 1 / schedule.step_weights("equal_gradient")
    slope = scale_T / scale_T[0]
    measured = output_gradient_norms(schedule, seed=0)
    torch.testing.assert_close(measured / measured[0], slope.to(measured.dtype), rtol=1e-3, atol=0)
    # c_t / sigma_t by hand: the noise's coefficient in the mean over the standard deviation.
    alphas = stable_diffusion_scheduler().alphas_cumprod.double().tolist()
    timesteps = schedule.timesteps_T.tolist()
    by_hand = []
    for t in timesteps:
        a, before = alphas[t], alphas[max(t - 1000 // num_steps, 0)]
        variance = (1 - before) / (1 - a) * (1 - a / before)
        c = (1 - before - variance) ** 0.5 - (before * (1 - a) / a) ** 0.5
        by_hand.append(abs(c) / variance**0.5)
    torch.testing.assert_close(slope, torch.tensor(by_hand) / by_hand[0], rtol=1e-3, atol=0)
    assert by_hand[-2] == pytest.approx(last_noisy, abs=0.05)
    assert all(usual[0] <= value <= usual[1] for value in by_hand[:-2] + by_hand[-1:])


@pytest.mark.parametrize("eta", [0.0, -0.5])
def test_eta_zero_is_refused_because_it_has_no_log_prob(eta: float) -> None:
    with pytest.raises(D3POError, match="expected above 0"):
        make_schedule(stable_diffusion_scheduler(), 10, eta)


@pytest.mark.parametrize(("num_steps", "steps_offset"), [(1000, 1), (1001, 0)])
def test_more_steps_than_the_model_has_timesteps_is_one_line(num_steps: int, steps_offset: int) -> None:
    with pytest.raises(D3POError, match=str(num_steps)) as caught:
        make_schedule(stable_diffusion_scheduler(steps_offset=steps_offset), num_steps, 1.0)
    assert "\n" not in str(caught.value)
