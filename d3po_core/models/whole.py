"""All weights of a network (``model.train: full``), with no LoRA.

Trained weights are always in single precision. When passes run in half precision, the network holds rounded copies and
passes its gradients on to the trained weights. With a small learning rate, most steps are smaller than the gap between
half-precision numbers and would be lost. Source: arXiv 1710.03740, Section 3.1.

The base weights wait in main memory and replace the trained ones for passes of the base model.
"""

import contextlib
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from d3po_core.errors import D3POError
from d3po_core.models.families import Family
from d3po_core.models.weights import NETWORK_FILE


class Whole:
    """See Trained."""

    def __init__(self, network: Any, family: Family, dtype: torch.dtype, device: torch.device) -> None:
        self._network, self._family, self._device = network, family, device
        network.requires_grad_(True)
        self._passing = dict(sorted(network.named_parameters()))
        self._base = {name: weight.detach().to("cpu", copy=True) for name, weight in self._passing.items()}
        self._trained = self._passing
        if dtype != torch.float32:
            self._trained = {
                name: torch.nn.Parameter(weight.detach().float()) for name, weight in self._passing.items()
            }
            for name, weight in self._passing.items():
                weight.register_post_accumulate_grad_hook(partial(_hand_on, self._trained[name]))

    def parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """Return names and values of the network's weights in single precision, in a fixed order."""
        return list(self._trained.items())

    @torch.no_grad()
    def changed(self) -> None:
        """Round the trained weights into the network used for passes."""
        if self._trained is not self._passing:
            for name, weight in self._passing.items():
                weight.copy_(self._trained[name])

    @contextlib.contextmanager
    def base(self) -> Iterator[None]:
        """Give the network the base weights within this context, for passes without gradient."""
        trained = [weight.data for weight in self._passing.values()]
        try:
            for name, weight in self._passing.items():
                weight.data = self._base[name].to(self._device)
            yield
        finally:
            for weight, data in zip(self._passing.values(), trained, strict=True):
                weight.data = data

    @contextlib.contextmanager
    def merged(self) -> Iterator[None]:
        """Do nothing: there is no LoRA to merge."""
        yield

    def reset(self) -> None:
        """Restore the base weights."""
        self._take(self._base)

    def save(self, folder: Path) -> Path:
        """Write the network as a folder for its class's ``from_pretrained``; return the weights file."""
        part = folder / self._family.NETWORK
        self._network.save_config(part)
        config = json.loads((part / "config.json").read_text())
        config.pop("_name_or_path", None)  # the base's path on this machine
        (part / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        state = self._network.state_dict() | self._trained
        state = {name: weight.detach().cpu().contiguous() for name, weight in state.items()}
        save_file(state, part / NETWORK_FILE, metadata={"format": "pt"})
        return part / NETWORK_FILE

    def load(self, folder: Path) -> None:
        """Load the network's weights from a checkpoint folder.

        Raises:
            D3POError: the file is missing, damaged, or from another network.
        """
        try:
            state = load_file(folder / self._family.NETWORK / NETWORK_FILE)
        except (OSError, SafetensorError) as error:
            raise D3POError(
                f"checkpoint {folder}: cannot be read ({error}); restore it or start a new campaign"
            ) from None
        own = self._network.state_dict()
        if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in own.items()}:
            raise D3POError(f"checkpoint {folder}: its network has other layers than that of model.path")
        self._take(state)

    @torch.no_grad()
    def _take(self, state: dict[str, torch.Tensor]) -> None:
        for name, weight in self._trained.items():
            weight.copy_(state[name])
        self.changed()


def _hand_on(trained: torch.nn.Parameter, weight: torch.nn.Parameter) -> None:
    """Add a half-precision gradient to the trained weight's, which sums micro-batches in single precision."""
    assert weight.grad is not None
    gradient, weight.grad = weight.grad.float(), None
    trained.grad = gradient if trained.grad is None else trained.grad.add_(gradient)
