"""Estimate how many bytes a round writes, and check that the disk has room for them."""

import math
import shutil

from d3po_core.config import CampaignConfig
from d3po_core.errors import D3POError
from d3po_core.sizes import Size

# For a hub model that is not on this machine yet, assume Stable Diffusion 1.5.
UNKNOWN_LATENT, UNKNOWN_PIXELS, UNKNOWN_WEIGHTS = (4, 64, 64), 8, 860_000_000


def require_space(config: CampaignConfig, needed: int) -> None:
    """Check that the campaign's disk has this many free bytes.

    Raises:
        D3POError: it has fewer.
    """
    free = free_bytes(config)
    if free < needed:
        raise D3POError(
            f"a round needs about {needed / 1e6:.0f} MB in {config.folder} and {free / 1e6:.0f} MB are free; "
            "free some space, set runs_dir to another disk, or lower sample.groups_per_round"
        )


def free_bytes(config: CampaignConfig) -> int:
    """Return the free bytes of the disk that holds, or will hold, the campaign."""
    existing = next(path for path in (config.folder, *config.folder.parents) if path.exists())
    return shutil.disk_usage(existing).free


def written_bytes(config: CampaignConfig, latent: tuple[int, ...], per_side: int, trained: int) -> int:
    """Estimate the bytes a round writes: trajectories, images (at most one byte per channel as PNG), weights.

    Of several sizes, the largest counts.

    Args:
        config: the campaign's configuration.
        latent: shape of a latent of the native size; its last two dimensions are height and width.
        per_side: the pixel width of one latent element.
        trained: number of weights in a checkpoint; 0 for a LoRA, which is small.
    """
    trajectory = (config.sample.num_steps + 1) * max(
        math.prod(latent_at(latent, per_side, size)) for size in config.sample.image_sizes
    )
    trajectory *= 4 if config.sample.latent_dtype == "float32" else 2
    sampled = max(_pixel_bytes(latent, per_side, size) for size in config.sample.image_sizes)
    held_out = _pixel_bytes(latent, per_side, config.held_out_size)
    evaluation = config.evaluate.images_per_prompt * config.evaluate.max_prompts * held_out
    # Weights and two moments in single precision, both in the checkpoint and in the progress that it replaces.
    imported = 2 * config.sample.imported_groups * (trajectory // (config.sample.num_steps + 1) + sampled)
    return config.sample.images_per_round * (trajectory + sampled) + imported + evaluation + 2 * 3 * 4 * trained


def latent_at(latent: tuple[int, ...], per_side: int, size: Size | None) -> tuple[int, ...]:
    """Return the shape of a latent of an image of a size, from that of the native size."""
    return latent if size is None else (*latent[:-2], *(side // per_side for side in size))


def _pixel_bytes(latent: tuple[int, ...], per_side: int, size: Size | None) -> int:
    *_, height, width = latent_at(latent, per_side, size)
    return 3 * (height * per_side) * (width * per_side)
