"""Devices: which one the machine has, one GPU per process, and copies that do not block."""

from typing import TYPE_CHECKING

from d3po_core.config import CampaignConfig
from d3po_core.errors import D3POError

if TYPE_CHECKING:  # torch takes a second to import, and most commands need none
    import torch


def send(tensor: "torch.Tensor", device: "torch.device") -> "torch.Tensor":
    """Return the tensor on a device.

    Pin it first, since a copy from ordinary memory would wait for all of the GPU's pending work.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def check_processes(config: CampaignConfig) -> None:
    """Check that every process gets its own GPU on this machine; a cluster is asked when the run starts.

    Raises:
        D3POError: there are more processes than GPUs.
    """
    processes, scorers = config.compute.processes, config.scoring.gpus
    if processes + scorers == 1 or config.compute.address or device_type(config.model.device) == "cpu":
        return
    import torch

    gpus = torch.cuda.device_count()
    if processes + scorers > gpus:
        more, or_fewer = (f" and scoring.gpus {scorers}", " or scoring.gpus") if scorers else ("", "")
        raise D3POError(
            f"compute.processes is {processes}{more} but {gpus} CUDA device{'s are' if gpus != 1 else ' is'} visible; "
            f"expected one a process: lower compute.processes{or_fewer}, see what CUDA_VISIBLE_DEVICES hides, or set "
            "compute.address to a cluster with more"
        )


def device_type(device: str) -> str:
    """Return ``cuda`` or ``cpu``: what a configured device means on this machine."""
    import torch

    return "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
