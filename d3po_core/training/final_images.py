"""Final images as training data: x_0 with fresh noise, or the stored x_t with the noise that leads there from x_0.

The network's output is affine in x_0 and the noise, and a ``Schedule`` says how, so every family and prediction type
works alike. With x_0 = A x_t + B out and noise = C x_t + D out:

    x_t = (D x_0 - B noise) / det,   out = (A noise - C x_0) / det,   det = A D - B C

Noise levels are those of the sampler's steps: it asks the network about no others. The authors draw them from all of
the model's timesteps.

Tensor names carry their shape: T steps, R rows (one image at one step).
"""

import contextlib
from collections.abc import Iterator

import torch

from d3po_core.config import TrainConfig
from d3po_core.denoising.ddim import Schedule, per_row
from d3po_core.devices import send
from d3po_core.models.policy import Policy
from d3po_core.seeds import derive_seed, gaussian
from d3po_core.training.lesson import KeptOutputs, Lesson, Signals, TrainingSet
from d3po_core.training.objective import EMPTY, Objective, Rows, squares
from d3po_core.training.packing import Cell, equal_rows, equal_starts, labels_of, rows_of


class RoundStart:
    """A copy of the weights that a round starts from, to be the reference while they are trained."""

    def __init__(self, policy: Policy) -> None:
        keep_on = policy.device if policy.plan.stays else torch.device("cpu")
        self._policy = policy
        self._values = [p.detach().to(keep_on, copy=True) for _, p in policy.weights.parameters()]

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Give the policy these weights within this context, for passes without gradient."""
        parameters = [parameter for _, parameter in self._policy.weights.parameters()]
        trained = [parameter.data for parameter in parameters]
        try:
            for parameter, value in zip(parameters, self._values, strict=True):
                parameter.data = value.to(parameter.device)
            self._policy.weights.changed()
            yield
        finally:
            for parameter, data in zip(parameters, trained, strict=True):
                parameter.data = data
            self._policy.weights.changed()


class FinalImageLesson(Lesson):
    """The final images with noise, and the network's target and reference.

    Args:
        start: the weights that the round started from; those of the policy now by default.
    """

    def __init__(
        self, policy: Policy, schedule: Schedule, data: TrainingSet, config: TrainConfig, objective: Objective,
        guidance_scale: float, start: RoundStart | None = None,
    ) -> None:  # fmt: skip
        super().__init__(policy, schedule, data, config, objective, guidance_scale if objective.guided else 1.0)
        if policy.config.precision != "no" and objective.source == "own_noise":
            self.start_N = equal_starts(data.groups, data.latents_NTCHW)
        self._from_start = objective.reference != "none" and config.reference == "round_start"
        self._start = (start or RoundStart(policy)) if self._from_start else None
        self._noised = self._target = self._reference = self._base = KeptOutputs()

    @torch.no_grad()
    def begin(self, cells: list[Cell], update_seed: int, rows: int) -> None:
        """Draw the update's noise, and compute the outputs of the reference and of the base."""
        image_R, step_R = rows_of(cells)
        if not len(image_R):
            return
        latent_RCHW, target_RCHW = self._draw(image_R, step_R, update_seed)
        self._noised, self._target = (
            KeptOutputs.of(lambda *_, x=x: x, cells, len(image_R)) for x in (latent_RCHW, target_RCHW)
        )
        base, needs = None, self.objective.reference != "none" and not self._from_start
        if needs or self.objective.needs_base():
            with self.policy.base():
                base = KeptOutputs.of(self._output, cells, rows)
        self._base = base if base and self.objective.needs_base() else KeptOutputs()
        self._reference = base if base and needs else KeptOutputs()
        if self._start is not None:
            with self._start.active():
                self._reference = KeptOutputs.of(self._output, cells, rows)

    def _draw(self, image_R: torch.Tensor, step_R: torch.Tensor, update_seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return x_t and the output that leads from it to x_0; noise seeds are hashes of update, image and step."""
        images, steps = (send(x, self.keep_on) for x in (image_R, step_R))
        x0_RCHW = self.latents_NTCHW[images, -1].float()
        signal_R, noise_R, of_x0_R, of_noise_R = (
            per_row(send(x_T, self.keep_on)[steps], x0_RCHW) for x_T in self.schedule.forward()
        )
        if self.objective.source == "own_noise":
            latent_RCHW = self.latents_NTCHW[images, steps].float()
            drawn_RCHW = (latent_RCHW - signal_R * x0_RCHW) / noise_R
        else:
            drawn_RCHW = send(torch.stack(self._noise(image_R, step_R, update_seed)), self.keep_on)
            latent_RCHW = signal_R * x0_RCHW + noise_R * drawn_RCHW
        return latent_RCHW, of_x0_R * x0_RCHW + of_noise_R * drawn_RCHW

    def _noise(self, image_R: torch.Tensor, step_R: torch.Tensor, update_seed: int) -> list[torch.Tensor]:
        first, shape = list(range(len(self.prompts))), self.latents_NTCHW.shape[2:]
        if self.objective.shares_noise:
            first_of = {image: group.images[0] for group in self.data.groups for image in group.images}
            first = [first_of.get(image, image) for image in first]
        return [
            gaussian(derive_seed(update_seed, "noise", step, self.data.noise_seeds[first[image]]), *shape)
            for image, step in zip(image_R.tolist(), step_R.tolist(), strict=True)
        ]

    def replay(self, image_R: torch.Tensor, step_R: torch.Tensor) -> Signals:
        """Return the network's output."""
        return (self._output(image_R, step_R),)

    def _output(self, image_R: torch.Tensor, step_R: torch.Tensor) -> torch.Tensor:
        latent_RCHW = self._noised.of_rows(image_R, step_R, self.policy.device)
        first_U, pass_R = equal_rows(self.start_N, image_R, step_R).unique(return_inverse=True)
        conditioning = self.policy.encode([self.prompts[image_R[row]] for row in first_U.tolist()], self.guidance_scale)
        step_U, first_U, pass_R = (send(x, self.policy.device) for x in (step_R[first_U], first_U, pass_R))
        return self.policy.predict(latent_RCHW[first_U], self.schedule.timesteps_T[step_U], conditioning)[pass_R]

    def rows(self, cells: list[Cell], signals: Signals) -> Rows:
        """Return rows with outputs and targets."""
        (output_RCHW,) = signals
        device, schedule = self.policy.device, self.schedule
        step_R = send(rows_of(cells)[1], device)
        reference_RCHW = self._reference.at(cells, device)
        signal_R, noise_R = (x_T[step_R] for x_T in schedule.forward()[:2])
        kl_scale_R = schedule.output_slope_T[step_R] ** 2 / (2 * schedule.sigma_T[step_R] ** 2)
        kl_R = EMPTY
        if self._from_start:
            kl_R = kl_scale_R * squares(output_RCHW.detach() - reference_RCHW)
        return Rows(
            **labels_of(cells, device), step_R=step_R, output_RCHW=output_RCHW,
            base_RCHW=self._base.at(cells, device), target_RCHW=self._target.at(cells, device),
            reference_RCHW=reference_RCHW, sigma_R=schedule.sigma_T[step_R], kl_scale_R=kl_scale_R,
            x0_scale_R=schedule.x0_output_T[step_R].abs(), noise_share_R=noise_R / (signal_R + noise_R), kl_R=kl_R,
            update_mean=self.update_mean,
        )  # fmt: skip
