"""Draw a round's held-out images batch by batch and measure the drift; ranks take batches in turn."""

from pathlib import Path

import numpy as np
import torch

from d3po_core.config import CampaignConfig
from d3po_core.image_ids import held_out_id
from d3po_core.models.loaded import policy_at
from d3po_core.models.policy import Policy
from d3po_core.processes.job import Tell
from d3po_core.processes.ranks import own_share, sum_over_ranks
from d3po_core.sampling.drawing import draw_and_write
from d3po_core.sampling.drift import kl_from_base
from d3po_core.sampling.prompts import load_prompts
from d3po_core.sampling.rollout import Trajectories
from d3po_core.seeds import ImageSeed, evaluation_seeds
from d3po_core.store.images import save_pngs


def held_out_seeds(config: CampaignConfig) -> list[ImageSeed]:
    """Return the held-out images' seeds, prompt by prompt; the same in every round."""
    settings = config.evaluate
    prompts = load_prompts(settings.prompts, settings.prompt_column, "evaluate.prompts")[: settings.max_prompts]
    return evaluation_seeds(prompts, settings.images_per_prompt, config.seed)


def held_out_path(round_number: int, index: int) -> Path:
    """Return a held-out image's path, relative to the campaign; its name is its sample_id."""
    return Path(f"images/round={round_number}/{held_out_id(round_number, index)}.png")


def draw_held_out(config: CampaignConfig, round_number: int, tell: Tell) -> float | None:
    """Draw and write the held-out images with the round's checkpoint, and report the number of images.

    Returns:
        The drift: mean KL from the base over the trajectories of a fixed subset of images; None if the subset is empty.
    """
    policy = policy_at(config, round_number)
    seeds = held_out_seeds(config)
    wanted = min(config.evaluate.drift_images, len(seeds))
    chosen = np.linspace(0, len(seeds) - 1, wanted).round().astype(int).tolist()
    latents: dict[int, torch.Tensor] = {}  # [T+1, C, H, W] of the chosen images that this rank draws
    size = config.sample.batch_size
    starts = range(0, len(seeds), size)[own_share(policy.accelerator)]

    def write(index: int, trajectories: Trajectories, images: np.ndarray) -> int:
        places = range(starts[index], starts[index] + len(images))
        save_pngs(images, [config.folder / held_out_path(round_number, i) for i in places])
        latents.update({i: trajectories.latents_BTCHW[i - places[0]] for i in places if i in chosen})
        return len(images)

    batches = [seeds[start : start + size] for start in starts]
    for count in draw_and_write(policy, config.sample, batches, torch.float32, write):
        tell(count)
    return _drift(config, policy, seeds, chosen, latents) if wanted else None


def _drift(
    config: CampaignConfig, policy: Policy, seeds: list[ImageSeed], chosen: list[int], latents: dict[int, torch.Tensor]
) -> float:
    own = [place for place, i in enumerate(chosen) if i in latents]
    kl_D = torch.zeros(len(chosen))
    if own:
        schedule = policy.schedule(config.sample.num_steps, config.sample.eta)
        own_seeds = [seeds[chosen[place]] for place in own]
        latents_BTCHW = torch.stack([latents[chosen[place]] for place in own])
        guidance = config.sample.guidance_scale
        kl_D[own] = policy.sampling_rows.fit(
            config.sample.batch_size,
            lambda rows: kl_from_base(policy, schedule, own_seeds, latents_BTCHW, guidance, rows),
        )
    kl_D = kl_D.to(policy.device)
    sum_over_ranks(policy.accelerator, [kl_D])  # one rank fills each entry; the others hold 0
    return float(kl_D.cpu().mean())
