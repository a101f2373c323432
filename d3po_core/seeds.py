"""Seeds derived from an image's identity, so that it does not depend on batch size or sharding."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from d3po_core.sizes import Size


def derive_seed(*parts: str | int) -> int:
    """Return a 63-bit seed, a hash of the given parts; different parts give unrelated seeds."""
    digest = hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def gaussian(seed: int, *shape: int) -> torch.Tensor:
    """Return standard normal float32 numbers drawn on the CPU, the same on every machine and device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class GaussianSteps:
    """The numbers of ``gaussian(seed, T, *shape)`` for each of B seeds, one step at a time, for any T.

    They are the same if a step has a multiple of 16 numbers, as latents do, because of how torch draws.
    """

    def __init__(self, seeds: list[int], *shape: int) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._shape = shape

    def next(self, *, pinned: bool = False) -> torch.Tensor:
        """Return the next step's numbers ``[B, *shape]``; a copy from pinned memory to a GPU does not block.

        One thread draws in place. Stacking per-row tensors would start a parallel copy, which stalls when other
        processes hold the cores.
        """
        step_B = torch.empty(len(self._generators), *self._shape, pin_memory=pinned)
        for generator, numbers in zip(self._generators, step_B, strict=True):
            torch.randn(self._shape, generator=generator, out=numbers)
        return step_B


def permutation(seed: int, size: int) -> list[int]:
    """Return a random order of ``range(size)``."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()


@dataclass(frozen=True)
class ImageSeed:
    """An image's prompt, the seed of its x_T, the seed of the noise of its T steps, and its size.

    The size is height and width in pixels; None is the network's native size.
    """

    prompt: str
    initial_seed: int
    noise_seed: int
    size: Size | None = None


def member_seed(
    campaign_seed: int, round_number: int, prompt: str, occurrence: int, member: int, share_initial_latent: bool,
    sizes: Sequence[Size | None] = (None,),
) -> ImageSeed:  # fmt: skip
    """Return the prompt, the seeds and the size of a member of a round's group.

    Args:
        campaign_seed: the campaign's seed.
        round_number: the round.
        prompt: the group's prompt.
        occurrence: how many earlier groups of the round have this prompt.
        member: the image's place in its group.
        share_initial_latent: whether all members start from one x_T.
        sizes: the sizes to draw the group's from.
    """
    key = (campaign_seed, round_number, prompt, occurrence)
    initial = () if share_initial_latent else (member,)
    size = sizes[derive_seed(*key, "size") % len(sizes)]
    return ImageSeed(prompt, derive_seed(*key, "x_T", *initial), derive_seed(*key, "noise", member), size)


def evaluation_seeds(
    prompts: list[str], images_per_prompt: int, campaign_seed: int, size: Size | None = None
) -> list[ImageSeed]:
    """Return the held-out images' prompts, seeds and size, the same in every round and never used in training."""
    keys = [(campaign_seed, "evaluate", prompt, k) for prompt in prompts for k in range(images_per_prompt)]
    return [ImageSeed(key[2], derive_seed(*key, "x_T"), derive_seed(*key, "noise"), size) for key in keys]
