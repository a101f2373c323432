"""The interface of trained weights: a LoRA beside the network (lora.py), or all its weights (whole.py)."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import torch


class Trained(Protocol):
    """The weights that training changes."""

    def parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """Return names and values of the trained weights in single precision, in a fixed order."""
        ...

    def changed(self) -> None:
        """Make later passes use the parameters' new values."""
        ...

    def base(self) -> AbstractContextManager[None]:
        """Make the network the base model within this context, for passes without gradient."""
        ...

    def merged(self) -> AbstractContextManager[None]:
        """Make passes as fast as the base model's within this context; results are the same up to rounding."""
        ...

    def reset(self) -> None:
        """Go back to the seeded start, which is the base model."""
        ...

    def save(self, folder: Path) -> Path:
        """Write the weights as files that diffusers reads; return the weights file."""
        ...

    def load(self, folder: Path) -> None:
        """Load the weights from a checkpoint folder.

        Raises:
            D3POError: a file is missing or damaged, or its layers differ.
        """
        ...
