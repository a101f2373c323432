"""Measure the trained model's drift from the base on the images that evaluation draws."""

import torch

from d3po_core.denoising.ddim import Schedule, gaussian_kl, per_row, step_mean
from d3po_core.devices import send
from d3po_core.models.policy import Policy
from d3po_core.seeds import GaussianSteps, ImageSeed
from d3po_core.speed.compiling import pad_rows


@torch.no_grad()
def kl_from_base(
    policy: Policy, schedule: Schedule, seeds: list[ImageSeed], latents_BTCHW: torch.Tensor, guidance_scale: float,
    rows: int,
) -> torch.Tensor:  # fmt: skip
    """Return KL(policy || base) along the policy's trajectories, ``[B]``, nats per element.

    Each step's KL is exact (two Gaussians with the same variance). By the chain rule, the sum over a sampled
    trajectory's steps is an unbiased estimate of the KL between whole trajectories. Steps with sigma 0 do not count.
    Only the base runs over the trajectories; subtracting the noise from the samples gives the policy's means.

    Args:
        policy: the policy.
        schedule: the T steps, on the policy's device.
        seeds: the seeds of the B images.
        latents_BTCHW: x_T ... x_0 as the policy sampled them, ``[B, T+1, C, H, W]`` on the CPU in float32; rounding to
            another dtype would count as drift.
        guidance_scale: the guidance that they were sampled with.
        rows: the number of rows (one image at one step) per pass.
    """
    if len(seeds) > rows:
        parts = [slice(i, i + rows) for i in range(0, len(seeds), rows)]
        return torch.cat(
            [kl_from_base(policy, schedule, seeds[p], latents_BTCHW[p], guidance_scale, rows) for p in parts]
        )
    steps, at_once = torch.nonzero(schedule.trainable_T).flatten().cpu(), max(1, rows // len(seeds))
    sigma_S = schedule.sigma_T.cpu()[steps]
    # Each pass holds all images at several steps, so one conditioning serves all; the last is padded to full size.
    passes = pad_rows(steps, -(-len(steps) // at_once) * at_once).view(-1, at_once)
    conditioning = policy.encode([seed.prompt for seed in seeds] * at_once, guidance_scale)

    def base_mean(steps_S: torch.Tensor) -> torch.Tensor:
        step_R = send(steps_S.repeat_interleave(len(seeds)), policy.device)
        latent = send(latents_BTCHW[:, steps_S].transpose(0, 1).flatten(0, 1), policy.device)
        output = policy.predict(latent, schedule.timesteps_T[step_R], conditioning)
        return step_mean(schedule, step_R, latent, output).unflatten(0, (at_once, -1))

    with policy.base(), policy.steady(conditioning):  # entered once: full training swaps the whole network
        base_SBCHW = torch.cat([base_mean(steps_S) for steps_S in passes])[: len(steps)]
    # The CPU does this while the device works.
    noise = GaussianSteps([seed.noise_seed for seed in seeds], *latents_BTCHW.shape[2:])
    noise_SBCHW = torch.stack([noise.next() for _ in schedule.timesteps_T])[steps]
    mean_SBCHW = latents_BTCHW[:, steps + 1].transpose(0, 1) - per_row(sigma_S, noise_SBCHW) * noise_SBCHW
    return gaussian_kl(mean_SBCHW, base_SBCHW.cpu(), sigma_S[:, None]).sum(dim=0)
