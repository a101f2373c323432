"""Draw batches of images and write them from another thread, so that the device never waits for files."""

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np

from d3po_core.config import SampleConfig
from d3po_core.models.policy import Policy
from d3po_core.sampling.rollout import Drawn, FirstOutputs, Trajectories, start_drawing
from d3po_core.seeds import ImageSeed
from d3po_core.store.images import beside_a_gpu

Measured = TypeVar("Measured")
Written = TypeVar("Written")

MOST_IN_MEMORY = 3
"""One batch that is written, one that the device works on, one that already waits for the device."""


def draw_and_write(
    policy: Policy,
    config: SampleConfig,
    batches: Iterable[tuple[int, list[ImageSeed]] | None],
    first: FirstOutputs,
    write: Callable[[int, Trajectories, np.ndarray, Measured], Written],
    measure: Callable[[int, Drawn], Measured],
) -> Iterator[Written]:
    """Sample, decode and write batches, in order.

    Args:
        policy: the policy.
        config: steps and guidance.
        batches: a number and the image seeds of each batch; None if no other batch is there yet.
        first: the first outputs of these images.
        write: called in another thread with a batch's number, its trajectories, its images, uint8
            ``[B, height, width, 3]``, and what was measured.
        measure: called in this thread with a batch's number and images that the device still computes.

    Yields:
        The return value of ``write`` for each batch.

    Raises:
        D3POError: not even one image fits into memory.
    """

    def write_when_there(number: int, drawn: Drawn, measured: Measured) -> Written:
        trajectories, images = drawn.wait()
        with contextlib.nullcontext() if number == newest else beside_a_gpu():
            return write(number, trajectories, images, measured)

    newest = -1  # the device is idle once this batch is there
    with ThreadPoolExecutor(1, thread_name_prefix="write") as writer:
        writing: deque[Future[Written]] = deque()
        for batch in batches:
            if batch is not None:
                number, seeds = batch
                newest = number
                drawn = start_drawing(policy, config, seeds, first)
                measured = measure(number, drawn)
            while writing and (writing[0].done() or (batch is not None and len(writing) == MOST_IN_MEMORY - 1)):
                yield writing.popleft().result()
            if batch is not None:
                writing.append(writer.submit(write_when_there, number, drawn, measured))
        for last in writing:
            yield last.result()
