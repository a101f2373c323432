"""Sample trajectories with exact log_probs.

Every latent is rounded to its stored dtype before it is scored and before the next step uses it. Replaying a stored
trajectory therefore gives the stored log_prob: exactly if computed the same way, and within float rounding in training,
which uses other batches and keeps the LoRA apart from the base weights.

All images of a batch have one size. Tensor names carry their shape: B images, T steps, C H W latent channels, height,
width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from d3po_core.config import SampleConfig
from d3po_core.denoising.ddim import Schedule, log_prob, per_row, step_mean
from d3po_core.devices import send
from d3po_core.errors import D3POError
from d3po_core.models.policy import Policy
from d3po_core.seeds import GaussianSteps, ImageSeed, gaussian
from d3po_core.sizes import Size

# A prompt, the seed of x_T, and the image's size.
Start = tuple[str, int, Size | None]


@dataclass(frozen=True)
class Trajectories:
    """Sampled trajectories on the CPU.

    Attributes:
        latents_BTCHW: x_T ... x_0 in the stored dtype, ``[B, T+1, C, H, W]``.
        log_probs_BT: log_prob of each step in nats per element, float32; 0 where sigma is 0.
    """

    latents_BTCHW: torch.Tensor
    log_probs_BT: torch.Tensor


@dataclass(frozen=True)
class Drawn:
    """Images that the device is still computing; call ``wait`` to get them.

    Attributes:
        trajectories: memory that the device may still write to.
        images_BHWC: uint8, likewise.
        done: event after the last write; None if everything is written.
    """

    trajectories: Trajectories
    images_BHWC: torch.Tensor
    done: torch.cuda.Event | None

    def wait(self) -> tuple[Trajectories, np.ndarray]:
        """Wait for the device and return trajectories and images.

        Raises:
            D3POError: some latents are not finite.
        """
        if self.done is not None:
            self.done.synchronize()
        finite_BT = self.trajectories.latents_BTCHW.isfinite().flatten(2).all(dim=2)
        if not finite_BT.all():
            step = int(finite_BT.all(dim=0).logical_not().nonzero()[0])
            raise D3POError(
                f"{int(finite_BT.all(dim=1).logical_not().sum())} of {len(finite_BT)} images have latents that are not "
                f"finite, from step {step} on; half precision may overflow (try model.precision bf16 or no), or the "
                "scheduler is not the model's"
            )
        return self.trajectories, self.images_BHWC.numpy()


@torch.no_grad()
def sample_trajectories(
    policy: Policy,
    schedule: Schedule,
    seeds: list[ImageSeed],
    guidance_scale: float,
    latent_dtype: torch.dtype,
    on_step: Callable[[int], None] | None = None,
) -> Trajectories:
    """Denoise a batch of images with the policy.

    Args:
        policy: the current policy.
        schedule: the T steps of images of their size, on the policy's device.
        seeds: one entry per image, all of one size; images with equal ``initial_seed`` share x_T.
        guidance_scale: classifier-free guidance, 1 for none.
        latent_dtype: dtype in which latents are stored, float32 or float16.
        on_step: called with the number of images after each step.
    """
    drawn = _denoise(policy, schedule, seeds, guidance_scale, latent_dtype, on_step=on_step)
    return Trajectories(drawn.latents_BTCHW.cpu(), drawn.log_probs_BT.cpu())


class FirstOutputs:
    """The network's outputs at x_T, computed once per shared start, in full batches.

    Used in half precision only. In full precision every row is computed, so that replaying a step in its batch gives
    the stored log_prob bit for bit.

    Args:
        policy: the current policy.
        config: steps and guidance.
        to_come: all images whose outputs may be requested, most of them in that order.
        latent_dtype: dtype in which latents are stored.
    """

    def __init__(
        self, policy: Policy, config: SampleConfig, to_come: list[ImageSeed], latent_dtype: torch.dtype
    ) -> None:
        starts = list(dict.fromkeys(map(_start, to_come)))
        helps = len(starts) < len(to_come) and policy.config.precision != "no"
        self._to_come, self._known = starts if helps else [], dict[Start, torch.Tensor]()
        self._policy, self._config, self.latent_dtype = policy, config, latent_dtype

    def of(self, seeds: list[ImageSeed]) -> torch.Tensor | None:
        """Return outputs ``[B, C, H, W]`` on the policy's device, or None to compute them row by row.

        Raises:
            D3POError: not even one image fits into memory.
        """
        if not self._to_come and not self._known:
            return None
        while missing := [start for start in map(_start, seeds) if start not in self._known]:
            # Skip those before it, which others draw or have drawn.
            place = self._to_come.index(missing[0])
            self._to_come = self._to_come[place:] + self._to_come[:place]
            self._known |= self._policy.sampling_rows.fit(len(seeds), self._next)
        return torch.stack([self._known[_start(seed)] for seed in seeds])

    def _next(self, rows: int) -> dict[Start, torch.Tensor]:
        """Return outputs of the next starts, padded to a full batch, since compiled code exists for that size."""
        *_, size = self._to_come[0]
        starts = [start for start in self._to_come if start[2] == size][:rows]
        padded = starts + starts[:1] * (rows - len(starts))
        conditioning = self._policy.encode([prompt for prompt, *_ in padded], self._config.guidance_scale)
        latent_BCHW = _first_latent(self._policy, [seed for _, seed, _ in padded], self.latent_dtype, size).float()
        schedule = self._policy.schedule(self._config.num_steps, self._config.eta, size)
        t_B = schedule.timesteps_T[torch.zeros(rows, dtype=torch.long, device=self._policy.device)]
        with self._policy.steady(conditioning):
            outputs = self._policy.predict(latent_BCHW, t_B, conditioning)
        drawn = set(starts)
        self._to_come = [start for start in self._to_come if start not in drawn]
        return dict(zip(starts, outputs, strict=False))


def _start(seed: ImageSeed) -> Start:
    """Return the key that an image's first step depends on."""
    return seed.prompt, seed.initial_seed, seed.size


def size_of(seeds: list[ImageSeed]) -> Size | None:
    """Return the size of a batch's images."""
    (size,) = {seed.size for seed in seeds}
    return size


def _first_latent(
    policy: Policy, initial_seeds: list[int], latent_dtype: torch.dtype, size: Size | None
) -> torch.Tensor:
    """Return x_T ``[B, C, H, W]`` in its stored dtype, on the policy's device."""
    shape = policy.latent_shape_at(size)
    drawn = {seed: gaussian(seed, *shape) for seed in dict.fromkeys(initial_seeds)}
    return send(torch.stack([drawn[seed] for seed in initial_seeds]).to(latent_dtype), policy.device)


def _denoise(
    policy: Policy, schedule: Schedule, seeds: list[ImageSeed], guidance_scale: float, latent_dtype: torch.dtype,
    first_BCHW: torch.Tensor | None = None, on_step: Callable[[int], None] | None = None,
) -> Trajectories:  # fmt: skip
    """Return trajectories on the policy's device without waiting for it.

    The first step uses the network's output ``first_BCHW`` if given.
    """
    count, num_steps, size = len(seeds), len(schedule.timesteps_T), size_of(seeds)
    conditioning = policy.encode([seed.prompt for seed in seeds], guidance_scale)
    # Noise is drawn step by step, while the device works.
    noise = GaussianSteps([seed.noise_seed for seed in seeds], *policy.latent_shape_at(size))
    latents, log_probs = [_first_latent(policy, [seed.initial_seed for seed in seeds], latent_dtype, size)], []
    with policy.merged(), policy.steady(conditioning):
        for step in range(num_steps):
            latent, step_B = latents[-1].float(), torch.full((count,), step, device=policy.device)
            if step == 0 and first_BCHW is not None:
                output = first_BCHW
            else:
                output = policy.predict(latent, schedule.timesteps_T[step_B], conditioning)
            mean = step_mean(schedule, step_B, latent, output)
            sigma_B = schedule.sigma_T[step_B]
            noise_BCHW = send(noise.next(pinned=policy.device.type == "cuda"), policy.device)
            stored = (mean + per_row(sigma_B, mean) * noise_BCHW).to(latent_dtype)
            log_probs.append(log_prob(stored.float(), mean, sigma_B))
            latents.append(stored)
            if on_step:
                on_step(count)
    return Trajectories(torch.stack(latents, dim=1), torch.stack(log_probs, dim=1))


def draw_images(
    policy: Policy, config: SampleConfig, seeds: list[ImageSeed], latent_dtype: torch.dtype
) -> tuple[Trajectories, np.ndarray]:
    """Sample and decode a batch; return trajectories and uint8 images ``[B, height, width, 3]``.

    The same batch gives the same bytes on the same machine with the same number of threads. In another batch, the same
    images agree within float rounding.
    """
    return start_drawing(policy, config, seeds, FirstOutputs(policy, config, seeds, latent_dtype)).wait()


@torch.no_grad()
def start_drawing(policy: Policy, config: SampleConfig, seeds: list[ImageSeed], first: FirstOutputs) -> Drawn:
    """Start to sample and decode a batch; on a GPU this returns before the images are done.

    Args:
        policy: the current policy.
        config: steps and guidance.
        seeds: one entry per image.
        first: the first outputs of these images, and possibly of later ones.

    Raises:
        D3POError: not even one image fits into memory.
    """
    schedule = policy.schedule(config.num_steps, config.eta, size_of(seeds))
    first_BCHW = first.of(seeds)

    def draw(rows: int) -> list[tuple[torch.Tensor, ...]]:
        return [
            _draw(policy, config, schedule, seeds[part], first.latent_dtype,
                  None if first_BCHW is None else first_BCHW[part])
            for part in (slice(i, i + rows) for i in range(0, len(seeds), rows))
        ]  # fmt: skip

    parts = policy.sampling_rows.fit(len(seeds), draw)
    joined = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    latents, log_probs, images = (tensor.to("cpu", non_blocking=True) for tensor in joined)
    done = None
    if policy.device.type == "cuda":
        done = torch.cuda.Event()
        done.record()
    return Drawn(Trajectories(latents, log_probs), images, done)


def _draw(
    policy: Policy, config: SampleConfig, schedule: Schedule, seeds: list[ImageSeed], latent_dtype: torch.dtype,
    first_BCHW: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return latents, log_probs and images of one chunk, on the policy's device."""
    drawn = _denoise(policy, schedule, seeds, config.guidance_scale, latent_dtype, first_BCHW)
    return drawn.latents_BTCHW, drawn.log_probs_BT, policy.decode_on_device(drawn.latents_BTCHW[:, -1])


def replay_steps(
    policy: Policy,
    schedule: Schedule,
    prompts: list[str],
    latent_BCHW: torch.Tensor,
    next_BCHW: torch.Tensor,
    step_B: torch.Tensor,
    guidance_scale: float,
    equal_B: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return log_prob ``[B]``, mean and network output of stored steps under the current policy, with gradient.

    Args:
        policy: the policy to score with.
        schedule: the T steps, on the policy's device.
        prompts: B prompts.
        latent_BCHW: stored x_t.
        next_BCHW: stored x_{t-1}.
        step_B: index of each row's step.
        guidance_scale: the guidance that the trajectory was sampled with.
        equal_B: for each row, the first row with the same prompt, x_t and step; it passes through the network for all.
    """
    equal_B = torch.arange(len(prompts)) if equal_B is None else equal_B
    first_U, pass_B = equal_B.unique(return_inverse=True)
    conditioning = policy.encode([prompts[row] for row in first_U.tolist()], guidance_scale)
    latent, following = (send(x, policy.device).float() for x in (latent_BCHW, next_BCHW))
    step_B, first_U, pass_B = (send(x, policy.device) for x in (step_B, first_U, pass_B))
    output = policy.predict(latent[first_U], schedule.timesteps_T[step_B[first_U]], conditioning)[pass_B]
    mean = step_mean(schedule, step_B, latent, output)
    return log_prob(following, mean, schedule.sigma_T[step_B]), mean, output
