"""Devices: which there are, one for each process, and copies to them that nobody waits for."""

from typing import TYPE_CHECKING

from d3po_core.config import ModelConfig
from d3po_core.errors import D3POError

if TYPE_CHECKING:  # torch takes a second to import, and most commands need none
    import torch


def send(tensor: "torch.Tensor", device: "torch.device") -> "torch.Tensor":
    """A tensor on a device. From ordinary memory a copy to a GPU would wait for all that the GPU still has to do."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def check_processes(config: ModelConfig) -> None:
    """Make sure that every process gets a GPU of its own, where there are any.

    Raises:
        D3POError: more processes than GPUs.
    """
    if config.processes == 1 or device_type(config.device) == "cpu":
        return
    import torch

    gpus = torch.cuda.device_count()
    if config.processes > gpus:
        raise D3POError(
            f"model.processes is {config.processes} but {gpus} CUDA device{'s are' if gpus != 1 else ' is'} visible; "
            "expected one a process: lower model.processes, or see what CUDA_VISIBLE_DEVICES hides"
        )


def device_type(device: str) -> str:
    """``cuda`` or ``cpu``: what a device of the configuration is on this machine."""
    import torch

    return "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
