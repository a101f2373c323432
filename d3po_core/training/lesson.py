"""A round's training data, and what the objective sees of it: stored steps under the current policy.

Tensor names carry their shape: N images in a group, T steps, C H W latent channels, height, width, R rows (one image
at one step) of a micro-batch.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch

from d3po_core.config import TrainConfig
from d3po_core.denoising.ddim import Schedule, gaussian_kl, per_row, rounding_kl
from d3po_core.devices import send
from d3po_core.models.policy import Policy
from d3po_core.processes.ranks import own_share, sum_over_ranks
from d3po_core.sampling.rollout import replay_steps
from d3po_core.seeds import GaussianSteps, derive_seed, permutation
from d3po_core.sizes import Size
from d3po_core.training.objective import EMPTY, Objective, Rows
from d3po_core.training.packing import Cell, PairedGroup, equal_rows, equal_starts, labels_of, rows_of, shuffled_cells

# What the network says of rows, with gradient.
Signals = tuple[torch.Tensor, ...]
Replay = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class TrainingSet:
    """Trajectories of a round's labelled images of one size.

    Attributes:
        prompts: N prompts.
        latents_NTCHW: stored latents x_T ... x_0, ``[N, T+1, C, H, W]``.
        log_probs_NT: log_probs stored at sampling, ``[N, T]``.
        groups: pairs as (winner, loser, weight), indices into N, and labels of single images.
        noise_seeds: N seeds of the steps' noise; they recover the sampling policy's means.
        size: their height and width in pixels; None if an earlier version drew them, at the network's native size.
        imported: images of a data set, which have no trajectory; only their last latent counts.
    """

    prompts: list[str]
    latents_NTCHW: torch.Tensor
    log_probs_NT: torch.Tensor
    groups: list[PairedGroup]
    noise_seeds: list[int]
    size: Size | None = None
    imported: frozenset[int] = frozenset()

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


class Lesson(ABC):
    """Everything fixed during a round's training: policy, steps, step weights, trajectories.

    Args:
        policy: the policy.
        schedule: the T steps that the trajectories were sampled with, on the policy's device.
        data: trajectories and labels.
        config: learning settings.
        objective: what is learned.
        guidance_scale: the guidance of training's passes.
    """

    def __init__(
        self, policy: Policy, schedule: Schedule, data: TrainingSet, config: TrainConfig, objective: Objective,
        guidance_scale: float,
    ) -> None:  # fmt: skip
        self.policy, self.schedule, self.config, self.guidance_scale = policy, schedule, config, guidance_scale
        self.objective, self.data, self.prompts = objective, data, data.prompts
        self.start_N = list(range(len(data.prompts)))
        # Latents are small beside the activations, so only the memory-saving modes keep them on the CPU.
        self.keep_on = policy.device if policy.plan.stays else torch.device("cpu")
        self.latents_NTCHW = data.latents_NTCHW.to(self.keep_on)
        self.steps = trainable_steps(schedule)
        self.steps_per_image = min(config.steps_per_image or len(self.steps), len(self.steps))
        self.update_mean = EMPTY

    def cells(self, groups: list[PairedGroup], update_seed: int) -> list[Cell]:
        """Return an update's groups at their steps, in random order."""
        if self.steps_per_image == len(self.steps):
            return shuffled_cells(groups, self.steps, update_seed)
        drawn = []
        for group in groups:
            seed = derive_seed(update_seed, "levels", self.data.noise_seeds[group.images[0]])
            drawn += [(group, self.steps[k]) for k in permutation(seed, len(self.steps))[: self.steps_per_image]]
        return [drawn[index] for index in permutation(update_seed, len(drawn))]

    def units(self, groups: list[PairedGroup]) -> int:
        """Return the number of pairs or images that the loss is a mean over."""
        pairs = self.objective.takes() == "pairs"
        return sum(len(group.pairs if pairs else group.images) for group in groups)

    @abstractmethod
    def begin(self, cells: list[Cell], update_seed: int, rows: int) -> None:
        """Compute what an update needs without gradient, a number of rows at once."""

    @abstractmethod
    def replay(self, image_R: torch.Tensor, step_R: torch.Tensor) -> Signals:
        """Return what the current policy says of rows."""

    @abstractmethod
    def rows(self, cells: list[Cell], signals: Signals) -> Rows:
        """Return what the objective sees of a micro-batch."""


class TrajectoryLesson(Lesson):
    """Stored steps, scored as they were sampled.

    Args:
        rows: the (image, step) rows that will be replayed, ``[R, 2]``; all by default.
    """

    def __init__(
        self, policy: Policy, schedule: Schedule, data: TrainingSet, config: TrainConfig, objective: Objective,
        guidance_scale: float, rows: torch.Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__(policy, schedule, data, config, objective, guidance_scale)
        if policy.config.precision != "no":
            self.start_N = equal_starts(data.groups, data.latents_NTCHW)
        elements = self.latents_NTCHW[0, 0].numel() if config.log_prob == "sum" and data.groups else 1
        self.weight_T = schedule.step_weights(config.timestep_weighting) * elements
        self.noise_NTCHW = data.noise_NTCHW.to(self.keep_on)
        self.sampled_NT = self.reference_NT = data.log_probs_NT.to(policy.device)
        self._base = KeptOutputs()
        if config.reference == "base" and data.groups:
            every = torch.cartesian_prod(torch.arange(len(data.prompts)), torch.tensor(self.steps))
            self.reference_NT = _base_log_probs(self, every if rows is None else rows)

    @torch.no_grad()
    def begin(self, cells: list[Cell], update_seed: int, rows: int) -> None:
        """Compute the base's outputs if the objective needs them."""
        if self.objective.needs_base():
            with self.policy.base():
                self._base = KeptOutputs.of(lambda image_R, step_R: self.replay(image_R, step_R)[2], cells, rows)

    def replay(self, image_R: torch.Tensor, step_R: torch.Tensor) -> Signals:
        """Return log_prob ``[R]``, mean and network output of stored steps under the current policy."""
        images, steps = (send(x, self.latents_NTCHW.device) for x in (image_R, step_R))
        return replay_steps(
            self.policy,
            self.schedule,
            [self.prompts[i] for i in image_R.tolist()],
            self.latents_NTCHW[images, steps],
            self.latents_NTCHW[images, steps + 1],
            steps,
            self.guidance_scale,
            equal_rows(self.start_N, image_R, step_R),
        )

    def rows(self, cells: list[Cell], signals: Signals) -> Rows:
        """Return rows with log_probs and means.

        The KL is between the sampling policy's step and the current policy's step at the stored x_t, in nats per
        element, without gradient. It is exact up to float16 rounding.
        """
        log_prob_R, mean_RCHW, output_RCHW = signals
        image_R, step_R = rows_of(cells)
        images, steps = (send(x, self.latents_NTCHW.device) for x in (image_R, step_R))
        following, noise = (
            send(x, self.policy.device)
            for x in (self.latents_NTCHW[images, steps + 1], self.noise_NTCHW[images, steps])
        )
        image_R, step_R = send(image_R, self.policy.device), send(step_R, self.policy.device)
        sigma_R = self.schedule.sigma_T[step_R]
        sampled_RCHW = following.float() - per_row(sigma_R, noise) * noise
        kl_R = gaussian_kl(mean_RCHW.detach(), sampled_RCHW, sigma_R) - rounding_kl(following, sigma_R)
        return Rows(
            **labels_of(cells, self.policy.device), step_R=step_R, output_RCHW=output_RCHW,
            base_RCHW=self._base.at(cells, self.policy.device), log_prob_R=log_prob_R, mean_RCHW=mean_RCHW,
            reference_log_prob_R=self.reference_NT[image_R, step_R],
            sampled_log_prob_R=self.sampled_NT[image_R, step_R], sampled_mean_RCHW=sampled_RCHW,
            step_weight_R=self.weight_T[step_R], sigma_R=sigma_R,
            kl_scale_R=self.schedule.output_slope_T[step_R] ** 2 / (2 * sigma_R**2), kl_R=kl_R,
            update_mean=self.update_mean,
        )  # fmt: skip


class KeptOutputs:
    """Tensors of an update's rows, by image and step, such as network outputs."""

    def __init__(self, place: dict[tuple[int, int], int] | None = None, output_QCHW: torch.Tensor = EMPTY) -> None:
        self._place, self._output_QCHW = place or {}, output_QCHW

    @classmethod
    def of(cls, replay: Replay, cells: list[Cell], rows: int) -> "KeptOutputs":
        """Compute the outputs of all rows, some at a time."""
        image_R, step_R = rows_of(cells)
        if not len(image_R):
            return cls()
        parts = zip(image_R.split(rows), step_R.split(rows), strict=True)
        places = {key: row for row, key in enumerate(zip(image_R.tolist(), step_R.tolist(), strict=True))}
        return cls(places, torch.cat([replay(*part) for part in parts]))

    def at(self, cells: list[Cell], device: torch.device) -> torch.Tensor:
        """Return the outputs of a micro-batch's rows; empty if none were computed."""
        return self.of_rows(*rows_of(cells), device) if self._place else EMPTY

    def of_rows(self, image_R: torch.Tensor, step_R: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Return the outputs of these rows."""
        keys = zip(image_R.tolist(), step_R.tolist(), strict=True)
        return send(self._output_QCHW[[self._place[key] for key in keys]], device)


def trainable_steps(schedule: Schedule) -> list[int]:
    """Return the indices of the steps with noise; only these are trained on."""
    return torch.nonzero(schedule.trainable_T.cpu()).flatten().tolist()


@torch.no_grad()
def _base_log_probs(lesson: TrajectoryLesson, rows_R2: torch.Tensor) -> torch.Tensor:
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
