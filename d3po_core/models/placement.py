"""Keep a pipeline's parts on the device all the time, or only while they are needed."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


class Placement:
    """Moves a pipeline's parts between device and main memory.

    Args:
        pipeline: the pipeline.
        device: where parts compute.
        moves: if true, unused parts wait in main memory; else parts stay where they are put.
    """

    def __init__(self, pipeline: Any, device: torch.device, moves: bool) -> None:
        self.moves = moves
        self._pipeline, self._device = pipeline, device

    def move(self, name: str, device: torch.device | str) -> None:
        """Move a part to a device, if the pipeline has it."""
        part = getattr(self._pipeline, name, None)
        if part is not None:
            part.to(device)

    @contextlib.contextmanager
    def on_device(self, *parts: str) -> Iterator[None]:
        """Keep these parts on the device within this context; afterwards they go to main memory if ``moves``."""
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
