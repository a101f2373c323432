"""The steps of a flow-matching model as Gaussians: its ODE turned into the SDE with the same marginals.

    x_t = (1 - t) x_0 + t noise,   v = noise - x_0,   t from 1 down to 0
    mean of x_{t+dt} = x_t + [v + s^2 / (2 t) * (x_t + (1 - t) v)] dt
    sigma = s * sqrt(-dt),   s = a * sqrt(t / (1 - t))

Source: Flow-GRPO, arXiv 2505.05470, Eq. 9 and Section 4.2. In terms of the estimates x_0 = x_t - t v and
noise = x_t + (1 - t) v the mean is (1 - t - dt) x_0 + (t + dt + s^2 dt / (2 t)) noise: a ``Schedule`` like DDIM's.
"""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from d3po_core.ddim import Schedule
from d3po_core.errors import D3POError


def make_flow_schedule(scheduler: FlowMatchEulerDiscreteScheduler, num_steps: int, noise_level: float) -> Schedule:
    """The steps that ``scheduler`` would take, as random ones; coefficients in float64, kept in float32.

    Args:
        scheduler: the model's; its shifts and spacings count.
        num_steps: number of steps T.
        noise_level: the factor a of s, above 0. At t = 1, where s has no bound, the next step's t is used in it.

    Raises:
        D3POError: the scheduler's shift depends on the image's size, or the noise level is not above 0.
    """
    if scheduler.config.use_dynamic_shifting:
        raise D3POError("the model's scheduler has use_dynamic_shifting=true, which is not supported; set it false")
    if noise_level <= 0:
        raise D3POError(f"eta is {noise_level}; expected above 0, since a deterministic step has no log_prob")
    scheduler.set_timesteps(num_steps)
    sigmas = scheduler.sigmas.cpu().double()
    t_T, dt_T = sigmas[:-1], sigmas.diff()
    bounded_T = torch.where(t_T == 1, t_T[1], t_T)
    s2_T = noise_level**2 * t_T / (1 - bounded_T)
    one_T = torch.ones_like(t_T)
    return Schedule(
        timesteps_T=scheduler.timesteps.cpu().float(),
        sigma_T=(s2_T * -dt_T).sqrt().float(),
        x0_latent_T=one_T.float(),
        x0_output_T=-t_T.float(),
        noise_latent_T=one_T.float(),
        noise_output_T=(1 - t_T).float(),
        mean_x0_T=(1 - t_T - dt_T).float(),
        mean_noise_T=(t_T + dt_T + s2_T * dt_T / (2 * t_T)).float(),
        clip_x0=None,
    )
