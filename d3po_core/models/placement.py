"""Where a pipeline's parts are: on the device all the time, or only while they are needed."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


class Placement:
    """Moves parts of a pipeline.

    Args:
        pipeline: the pipeline.
        device: where parts compute.
        moves: whether parts wait in main memory; otherwise they stay where they are put.
    """

    def __init__(self, pipeline: Any, device: torch.device, moves: bool) -> None:
        self.moves = moves
        self._pipeline, self._device = pipeline, device

    def move(self, name: str, device: torch.device | str) -> None:
        """Put a part somewhere, if the pipeline has it."""
        part = getattr(self._pipeline, name, None)
        if part is not None:
            part.to(device)

    @contextlib.contextmanager
    def on_device(self, *parts: str) -> Iterator[None]:
        """Within this context these parts are on the device; afterwards they wait in main memory, if parts move."""
        if not self.moves:
            yield
            return
        try:
            for part in parts:
                self.move(part, self._device)
            yield
        finally:
            for part in parts:
                self.move(part, "cpu")
