"""A flow-matching model's steps as Gaussians: its ODE becomes the SDE with the same marginals.

    x_t = (1 - t) x_0 + t noise,   v = noise - x_0,   t from 1 down to 0
    mean of x_{t+dt} = x_t + [v + s^2 / (2 t) * (x_t + (1 - t) v)] dt
    sigma = s * sqrt(-dt),   s = a * sqrt(t / (1 - t))

Source: Flow-GRPO, arXiv 2505.05470, Eq. 9 and Section 4.2. With the estimates x_0 = x_t - t v and
noise = x_t + (1 - t) v, the mean is (1 - t - dt) x_0 + (t + dt + s^2 dt / (2 t)) noise: a ``Schedule`` like DDIM's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from d3po_core.denoising.ddim import Schedule, finite
from d3po_core.errors import D3POError

# Variance of fine detail in units of the latent's, and the largest factor by which the steps may raise it.
FINE_DETAIL, MOST_LEFT = 0.01, 1.3


@dataclass(frozen=True)
class Levels:
    """The options with which a pipeline sets its scheduler's noise levels for T steps.

    Attributes:
        from_one: whether levels are spaced from 1 to 1/T before shifting; else the scheduler spaces them.
        mu: the shift for the image's size, for a scheduler that shifts dynamically.
    """

    from_one: bool = False
    mu: float | None = None


SCHEDULERS_OWN = Levels()


def set_levels(scheduler: FlowMatchEulerDiscreteScheduler, num_steps: int, levels: Levels) -> None:
    """Give the scheduler its T noise levels, as the model's pipeline does."""
    sigmas = np.linspace(1.0, 1 / num_steps, num_steps) if levels.from_one else None
    scheduler.set_timesteps(num_steps, sigmas=sigmas, mu=levels.mu)


def make_flow_schedule(
    scheduler: FlowMatchEulerDiscreteScheduler, num_steps: int, noise_level: float, levels: Levels = SCHEDULERS_OWN
) -> Schedule:
    """Return ``scheduler``'s steps with noise added; coefficients are computed in float64 and stored in float32.

    Args:
        scheduler: the model's scheduler, with its shifts and spacings.
        num_steps: number of steps T.
        noise_level: the factor a of s, above 0. At t = 1, where s is unbounded, s uses the next step's t.
        levels: what the pipeline tells the scheduler.

    Raises:
        D3POError: the noise level is not above 0, or the scheduler's numbers are not finite.
    """
    if noise_level <= 0:
        raise D3POError(f"eta is {noise_level}; expected above 0, since a deterministic step has no log_prob")
    set_levels(scheduler, num_steps, levels)
    sigmas = scheduler.sigmas.cpu().double()
    t_T, dt_T = sigmas[:-1], sigmas.diff()
    bounded_T = torch.where(t_T == 1, t_T[1], t_T)
    s2_T = noise_level**2 * t_T / (1 - bounded_T)
    one_T = torch.ones_like(t_T)
    return finite(
        Schedule(
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
    )


def flow_chain_of(config: Mapping[str, Any]) -> FlowMatchEulerDiscreteScheduler:
    """Return the scheduler of a flow's Euler steps from a configuration.

    Raises:
        D3POError: it is another solver, or its steps run backwards or add their own noise.
    """
    name = str(config.get("_class_name"))
    if name != "FlowMatchEulerDiscreteScheduler":
        raise D3POError(
            f"scheduler {name}: a flow's trained steps are FlowMatchEulerDiscreteScheduler's, and others choose other "
            "noise levels; put that scheduler's file into scheduler/scheduler_config.json"
        )
    for field in ("invert_sigmas", "stochastic_sampling"):
        if config.get(field):
            raise D3POError(f"scheduler {name}: {field} is {config[field]!r}, which is not supported; set it false "
                            "(scheduler/scheduler_config.json)")  # fmt: skip
    try:
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(dict(config))
        scheduler.set_timesteps(4, mu=1.0)
    except Exception as error:  # the library raises anything on invalid numbers
        raise D3POError(f"scheduler {name}: its configuration cannot be used ({error})") from None
    return scheduler


def flow_levels_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return Euler's configuration for a multistep DPM-Solver over a flow, which has the same noise levels.

    We train Euler's steps with the solver's shift, as DDIM's over other solvers' noise for models with a UNet. Another
    class's configuration comes back unchanged.

    Raises:
        D3POError: the solver is not one over a flow, or asks for other noise levels.
    """
    name = str(config.get("_class_name"))
    if name != "DPMSolverMultistepScheduler":
        return config
    needed = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "use_karras_sigmas": False,
              "use_exponential_sigmas": False, "use_beta_sigmas": False, "use_lu_lambdas": False,
              "use_dynamic_shifting": False, "thresholding": False}  # fmt: skip
    for field, wanted in needed.items():
        if config.get(field, wanted if wanted is False else None) != wanted:
            raise D3POError(f"scheduler {name}: {field} is {config.get(field)!r}, which the trained steps cannot "
                            f"follow; expected {wanted!r} (scheduler/scheduler_config.json)")  # fmt: skip
    return {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": config.get("flow_shift", 1.0),
            "num_train_timesteps": config.get("num_train_timesteps", 1000)}  # fmt: skip


def default_noise_level(
    scheduler: FlowMatchEulerDiscreteScheduler, num_steps: int, levels: Levels = SCHEDULERS_OWN
) -> float:
    """Return the largest noise level, at most 0.7, whose steps hardly raise the variance of fine detail.

    Flow-GRPO trains with 0.7. With few steps and a large shift this is too much, and the VAE decodes grain: after 10
    steps at a shift of 3, data of variance 0.01 end with 5.5 times as much, or 15 times at a noise level of 1.
    """
    factors = [factor / 100 for factor in range(70, 5, -5)]
    schedules = ((factor, make_flow_schedule(scheduler, num_steps, factor, levels)) for factor in factors)
    return next((factor for factor, schedule in schedules if variance_left(schedule) <= MOST_LEFT), 0.05)


def variance_left(schedule: Schedule, of_data: float = FINE_DETAIL) -> float:
    """Return the variance of Gaussian data after a flow's steps with an exact network, as a multiple of their own.

    Args:
        schedule: made by ``make_flow_schedule``.
        of_data: the variance of the data; their mean is 0.
    """
    variance = 1.0  # x_1 is pure noise
    for step in range(len(schedule.timesteps_T)):
        t = -float(schedule.x0_output_T[step])
        of_x0 = (1 - t) * of_data / ((1 - t) ** 2 * of_data + t**2)  # E[x_0 | x_t] = of_x0 * x_t
        of_noise = (1 - (1 - t) * of_x0) / t
        slope = float(schedule.mean_x0_T[step]) * of_x0 + float(schedule.mean_noise_T[step]) * of_noise
        variance = slope**2 * variance + float(schedule.sigma_T[step]) ** 2
    return variance / of_data
