"""What of a network is trained: a LoRA beside it (lora.py), or all of its weights (whole.py)."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import torch


class Trained(Protocol):
    """The weights that training changes."""

    def parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """Names and values of the trained weights in single precision, in a fixed order."""
        ...

    def changed(self) -> None:
        """Use new values of the parameters from now on."""
        ...

    def base(self) -> AbstractContextManager[None]:
        """Within this context the network is the base model, for passes without a gradient."""
        ...

    def merged(self) -> AbstractContextManager[None]:
        """Within this context passes compute the same function, up to rounding, as fast as the base model's."""
        ...

    def reset(self) -> None:
        """Go back to the seeded start, which is the base model."""
        ...

    def save(self, folder: Path) -> Path:
        """Write the weights as files that diffusers reads; returns the file that holds them."""
        ...

    def load(self, folder: Path) -> None:
        """Take the weights from a checkpoint folder.

        Raises:
            D3POError: a file is missing, damaged, or of other layers.
        """
        ...
