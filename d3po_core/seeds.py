"""Seeds derived from what an image is, so that it depends on nothing else: not on batch size, not on sharding."""

import hashlib
from collections.abc import Iterator

import torch


def derive_seed(*parts: str | int) -> int:
    """A 63-bit seed that is a hash of the given parts; different parts give unrelated seeds."""
    digest = hashlib.sha256("\x1f".join(str(part) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def gaussian(seed: int, *shape: int) -> torch.Tensor:
    """Standard normal float32 numbers drawn on the CPU, the same on every machine and device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gaussian_steps(seed: int, *shape: int) -> Iterator[torch.Tensor]:
    """The numbers of ``gaussian(seed, T, *shape)``, one step at a time, whatever T.

    The same numbers if a step has a multiple of 16 of them, as latents have: that is how torch draws.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randn(*shape, generator=generator)


def permutation(seed: int, size: int) -> list[int]:
    """A random order of ``range(size)``."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()
