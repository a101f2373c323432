"""Draw batches of images and write them from another thread, so that the device never waits for files."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch

from d3po_core.config import SampleConfig
from d3po_core.models.policy import Policy
from d3po_core.sampling.rollout import Drawn, FirstOutputs, Trajectories, start_drawing
from d3po_core.seeds import ImageSeed

Written = TypeVar("Written")

MOST_IN_MEMORY = 3
"""One batch that is written, one that the device works on, one that already waits for the device."""


def draw_and_write(
    policy: Policy,
    config: SampleConfig,
    batches: list[list[ImageSeed]],
    latent_dtype: torch.dtype,
    write: Callable[[int, Trajectories, np.ndarray], Written],
) -> Iterator[Written]:
    """Sample, decode and write batches, in order.

    Args:
        policy: the policy.
        config: steps and guidance.
        batches: the image seeds of each batch.
        latent_dtype: dtype in which latents are stored.
        write: called with a batch's index, its trajectories and its images, uint8 ``[B, height, width, 3]``.

    Yields:
        The return value of ``write`` for each batch.

    Raises:
        D3POError: not even one image fits into memory.
    """

    def write_when_there(index: int, drawn: Drawn) -> Written:
        return write(index, *drawn.wait())

    first = FirstOutputs(policy, config, [seed for batch in batches for seed in batch], latent_dtype)
    with ThreadPoolExecutor(1, thread_name_prefix="write") as writer:
        writing: deque[Future[Written]] = deque()
        for index, batch in enumerate(batches):
            drawn = start_drawing(policy, config, batch, first)
            while writing and (writing[0].done() or len(writing) == MOST_IN_MEMORY - 1):
                yield writing.popleft().result()
            writing.append(writer.submit(write_when_there, index, drawn))
        for last in writing:
            yield last.result()
