"""A round's training data, and the log_probs of its stored steps under the current policy.

Tensor names carry their shape: N images with a pair, T steps, C H W latent channels, height, width, R rows (one image
at one step) of a micro-batch.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from d3po_core.config import TrainConfig
from d3po_core.denoising.ddim import Schedule, gaussian_kl, rounding_kl
from d3po_core.devices import send
from d3po_core.models.policy import Policy
from d3po_core.processes.ranks import own_share, sum_over_ranks
from d3po_core.sampling.rollout import replay_steps
from d3po_core.seeds import GaussianSteps
from d3po_core.training.packing import PairedGroup, equal_rows, equal_starts


@dataclass(frozen=True)
class TrainingSet:
    """Trajectories of a round's paired images.

    Attributes:
        prompts: N prompts.
        latents_NTCHW: stored latents x_T ... x_0, ``[N, T+1, C, H, W]``.
        log_probs_NT: log_probs stored at sampling, ``[N, T]``.
        groups: pairs as (winner, loser, weight), indices into N.
        noise_seeds: N seeds of the steps' noise; they recover the sampling policy's means.
    """

    prompts: list[str]
    latents_NTCHW: torch.Tensor
    log_probs_NT: torch.Tensor
    groups: list[PairedGroup]
    noise_seeds: list[int]

    @cached_property
    def noise_NTCHW(self) -> torch.Tensor:
        """The noise of all steps ``[N, T, C, H, W]``, redrawn once from the seeds."""
        if not self.prompts:
            return torch.empty(0)
        num_images, num_latents, *shape = self.latents_NTCHW.shape
        noise, drawn = GaussianSteps(self.noise_seeds, *shape), torch.empty(num_images, num_latents - 1, *shape)
        for step in range(num_latents - 1):
            drawn[:, step] = noise.next()
        return drawn


class Lesson:
    """Everything fixed during a round's training: policy, steps, step weights, trajectories, reference.

    Args:
        policy: the policy.
        schedule: the T steps that the trajectories were sampled with, on the policy's device.
        data: trajectories and pairs.
        config: learning settings.
        guidance_scale: the guidance that the trajectories were sampled with.
        rows: the (image, step) rows that will be replayed, ``[R, 2]``; all by default.
    """

    def __init__(
        self, policy: Policy, schedule: Schedule, data: TrainingSet, config: TrainConfig, guidance_scale: float,
        rows: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        self.policy, self.schedule, self.config, self.guidance_scale = policy, schedule, config, guidance_scale
        self.prompts = data.prompts
        self.start_N = list(range(len(data.prompts)))
        if policy.config.precision != "no":
            self.start_N = equal_starts(data.groups, data.latents_NTCHW)
        # Latents are small beside the activations, so only the memory-saving modes keep them on the CPU.
        keep_on = policy.device if policy.plan.stays else torch.device("cpu")
        self.latents_NTCHW = data.latents_NTCHW.to(keep_on)
        self.steps = trainable_steps(schedule)
        elements = self.latents_NTCHW[0, 0].numel() if config.log_prob == "sum" and data.groups else 1
        self.weight_T = schedule.step_weights(config.timestep_weighting) * elements
        self.noise_NTCHW = data.noise_NTCHW.to(keep_on)
        self.reference_NT = data.log_probs_NT.to(policy.device)
        if config.reference == "base" and data.groups:
            every = torch.cartesian_prod(torch.arange(len(data.prompts)), torch.tensor(self.steps))
            self.reference_NT = _base_log_probs(self, every if rows is None else rows)

    def replay(self, image_R: torch.Tensor, step_R: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return log_prob and KL of stored steps under the current policy, each ``[R]``.

        The KL is between the sampling policy's step and the current policy's step at the stored x_t, in nats per
        element, without gradient. It is exact up to float16 rounding.
        """
        images, steps = (send(x, self.latents_NTCHW.device) for x in (image_R, step_R))
        following = self.latents_NTCHW[images, steps + 1]
        log_prob_R, mean_RCHW = replay_steps(
            self.policy,
            self.schedule,
            [self.prompts[i] for i in image_R.tolist()],
            self.latents_NTCHW[images, steps],
            following,
            steps,
            self.guidance_scale,
            equal_rows(self.start_N, image_R, step_R),
        )
        following, noise = (send(x, self.policy.device) for x in (following, self.noise_NTCHW[images, steps]))
        sigma_R = self.schedule.sigma_T[send(step_R, self.policy.device)]
        sampled_RCHW = following.float() - sigma_R[:, None, None, None] * noise
        kl_R = gaussian_kl(mean_RCHW.detach(), sampled_RCHW, sigma_R) - rounding_kl(following, sigma_R)
        return log_prob_R, kl_R


def trainable_steps(schedule: Schedule) -> list[int]:
    """Return the indices of the steps with noise; only these are trained on."""
    return torch.nonzero(schedule.trainable_T.cpu()).flatten().tolist()


@torch.no_grad()
def _base_log_probs(lesson: Lesson, rows_R2: torch.Tensor) -> torch.Tensor:
    """Return log_probs ``[N, T]`` of stored steps under the base model, one pass per row; other entries stay 0."""
    base_NT = torch.zeros_like(lesson.reference_NT)
    accelerator = lesson.policy.accelerator
    rows_R2 = rows_R2[own_share(accelerator)]

    def attempt(rows: int) -> None:
        for chunk in rows_R2.split(rows):
            image_R, step_R = chunk.unbind(1)
            base_NT[image_R, step_R] = lesson.replay(image_R, step_R)[0]

    with lesson.policy.base():
        lesson.policy.training_rows.fit(lesson.config.micro_batch, attempt)
    sum_over_ranks(accelerator, [base_NT])  # one rank fills each entry; the others hold 0
    return base_NT
