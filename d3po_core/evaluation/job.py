"""Draw a round's held-out images batch by batch and measure the drift."""

from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import numpy as np
import torch

from d3po_core.config import CampaignConfig
from d3po_core.image_ids import held_out_id
from d3po_core.models.loaded import policy_at
from d3po_core.models.policy import Policy
from d3po_core.processes.job import Made, QueueJob
from d3po_core.processes.parcel import keep_files
from d3po_core.sampling.drawing import draw_and_write
from d3po_core.sampling.drift import kl_from_base
from d3po_core.sampling.prompts import load_prompts
from d3po_core.sampling.rollout import Drawn, FirstOutputs, Trajectories
from d3po_core.seeds import ImageSeed, evaluation_seeds
from d3po_core.store.images import pngs_bytes
from d3po_core.store.stages import policy_files


def held_out_seeds(config: CampaignConfig) -> list[ImageSeed]:
    """Return the held-out images' seeds, prompt by prompt; the same in every round."""
    settings = config.evaluate
    prompts = load_prompts(settings.prompts, settings.prompt_column, "evaluate.prompts")[: settings.max_prompts]
    return evaluation_seeds(prompts, settings.images_per_prompt, config.seed, config.held_out_size)


def held_out_path(round_number: int, index: int) -> Path:
    """Return a held-out image's path, relative to the campaign; its name is its sample_id."""
    return Path(f"images/round={round_number}/{held_out_id(round_number, index)}.png")


def _batches(config: CampaignConfig, round_number: int) -> list[int]:
    return list(range(0, len(held_out_seeds(config)), config.sample.batch_size))


def _make(config: CampaignConfig, round_number: int, items: Iterable[int | None]) -> Iterator[Made]:
    """Draw batches as they come, each known by its first image's place, and measure the drift of chosen images."""
    policy = policy_at(config, round_number)
    seeds, size = held_out_seeds(config), config.sample.batch_size
    wanted = min(config.evaluate.drift_images, len(seeds))
    chosen = set(np.linspace(0, len(seeds) - 1, wanted).round().astype(int).tolist())

    def measure(start: int, drawn: Drawn) -> list[float]:
        own = [i for i in range(start, min(start + size, len(seeds))) if i in chosen]
        if not own:
            return []
        latents_BTCHW = drawn.wait()[0].latents_BTCHW[[i - start for i in own]]
        return _kl(config, policy, [seeds[i] for i in own], latents_BTCHW).tolist()

    def write(start: int, trajectories: Trajectories, images: np.ndarray, kl: list[float]) -> Made:
        paths = [held_out_path(round_number, start + i).as_posix() for i in range(len(images))]
        return Made(start, len(images), dict(zip(paths, pngs_bytes(images), strict=True)), kl)

    first = FirstOutputs(policy, config.sample, seeds, torch.float32)
    batches = (None if item is None else (item, seeds[item : item + size]) for item in items)
    return draw_and_write(policy, config.sample, batches, first, write, measure)


def _kl(config: CampaignConfig, policy: Policy, seeds: list[ImageSeed], latents_BTCHW: torch.Tensor) -> torch.Tensor:
    schedule = policy.schedule(config.sample.num_steps, config.sample.eta, config.held_out_size)
    return policy.sampling_rows.fit(
        config.sample.batch_size,
        lambda rows: kl_from_base(policy, schedule, seeds, latents_BTCHW, config.sample.guidance_scale, rows),
    )


def _mean(kls: list[list[float]]) -> float | None:
    kl_D = list(chain(*kls))
    return float(np.mean(kl_D)) if kl_D else None


EVALUATE = QueueJob(
    name="d3po_core.evaluation.job:EVALUATE",
    items=_batches,
    needs=lambda config, round_number: policy_files(config.folder, round_number, round_number),
    inputs=("evaluate.prompts",),
    make=_make,
    keep=keep_files,
    finish=_mean,
)
"""Draw the held-out images with the round's checkpoint; the units are images.

Its result is the drift: the mean KL from the base over the trajectories of a fixed subset of images; None if that is
empty.
"""
