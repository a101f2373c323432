"""Limit the rows per network pass: start with the configured number, halve it when memory runs out."""

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from d3po_core.errors import D3POError

Result = TypeVar("Result")
logger = logging.getLogger(__name__)


class RowLimit:
    """The largest batch that fits; found by halving, and kept for the life of the process.

    The batch size only decides how work is split; results stay the same up to rounding.

    Args:
        what: what the rows pass through, for messages.
        most: the most rows at once; None for as many as wanted.
        remedy: the setting that makes do with less memory from the start.
    """

    def __init__(self, what: str, most: int | None = None, remedy: str = "model.memory 'auto'") -> None:
        self.what, self._most, self._remedy = what, most, remedy

    @property
    def most(self) -> int | None:
        """Return the most rows that pass at once; None for as many as wanted."""
        return self._most

    def of(self, wanted: int) -> int:
        """Return as many of the wanted rows as fit."""
        return wanted if self._most is None else min(wanted, self._most)

    def fit(self, wanted: int, work: Callable[[int], Result]) -> Result:
        """Run work with a number of rows per pass; if memory runs out, warn and run it again with half as many.

        Raises:
            D3POError: not even one row fits.
        """
        while True:
            rows = self.of(wanted)
            try:
                return work(rows)
            except torch.OutOfMemoryError:
                self._halve(rows)
            torch.cuda.empty_cache()  # here, because the traceback no longer holds the failed work's tensors

    def _halve(self, rows: int) -> None:
        if rows <= 1:
            raise D3POError(
                f"{self.what}: out of memory with a single image at once; set model.memory 'small' or model.precision "
                "'bf16', or use a GPU with more memory"
            ) from None
        self._most = rows // 2
        logger.warning(
            "%s: %d rows at once do not fit the GPU's memory; going on with %d, with the same results up to rounding. "
            "%s takes fewer from the start", self.what, rows, self._most, self._remedy,
        )  # fmt: skip
