"""Share one job among ranks, one per GPU: split the work, sum over ranks, and check that they agree.

A process gets its rank and the number of ranks from accelerate. With one process, nothing here computes anything.
"""

import hashlib
import os
import socket
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState

from d3po_core.errors import RankError

_stores: dict[str, Any] = {}
_joined: dict[str, Any] = {}


def open_store(host: str) -> tuple[str, int]:
    """Open the store at which the ranks of a group meet, on this address only; return host and port."""
    listener = socket.create_server((host, 0))
    port = listener.getsockname()[1]
    _stores["own"] = torch.distributed.TCPStore(  # type: ignore[attr-defined]
        host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )
    return host, port


def join(gang: dict[str, Any]) -> None:
    """Make this process a rank of a group, instead of any earlier one; its accelerator follows.

    Nothing is done if it is that rank already: a new group costs seconds at its first sum.

    Args:
        gang: ``rank``, ``size``, ``store`` (host and port), ``device`` and ``seconds`` (the patience of a collective).
    """
    if _joined == gang:
        return
    _joined.clear()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)
    (host, port), rank, size = gang["store"], gang["rank"], gang["size"]
    place = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": 0, "MASTER_ADDR": host, "MASTER_PORT": port}
    if size == 1:
        for name in place:
            os.environ.pop(name, None)
    else:
        os.environ |= {name: str(value) for name, value in place.items()}
        store = _stores["own"] if rank == 0 else torch.distributed.TCPStore(host, port, is_master=False)  # type: ignore[attr-defined]
        patience = timedelta(seconds=gang["seconds"])
        PartialState(cpu=gang["device"] == "cpu", store=store, rank=rank, world_size=size, timeout=patience)
    Accelerator(cpu=gang["device"] == "cpu")  # every policy's accelerator shares its state
    _joined.update(gang)


def free_memory() -> None:
    """Return the GPU memory that PyTorch keeps for its next pass: scorers need some of it now."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def own_share(accelerator: Accelerator) -> slice:
    """Return the slice of a list of work that is this rank's; each item belongs to exactly one rank."""
    return slice(accelerator.process_index, None, accelerator.num_processes)


def sum_over_ranks(accelerator: Accelerator, tensors: Iterable[torch.Tensor]) -> None:
    """Replace floating-point tensors by their sums over all ranks; every rank gets the same bits."""
    if accelerator.num_processes == 1:
        return
    parts = list(tensors)
    sums = accelerator.reduce(torch.cat([part.flatten() for part in parts]), "sum")
    for part, total in zip(parts, sums.split([part.numel() for part in parts]), strict=True):
        part.copy_(total.view_as(part))


def check_agreement(accelerator: Accelerator, tensors: dict[str, torch.Tensor]) -> None:
    """Check that every rank holds the same bytes; all ranks must call this.

    Raises:
        RankError: they do not; the message names the ranks that differ from the first.
    """
    if accelerator.num_processes == 1:
        return
    digest = torch.tensor(list(_sha256(tensors).digest()), dtype=torch.uint8, device=accelerator.device)
    digests = [bytes(row.tolist()).hex() for row in accelerator.gather(digest[None]).cpu()]
    differing = [rank for rank, found in enumerate(digests) if found != digests[0]]
    if differing:
        shown = ", ".join(f"rank {rank} {found[:12]}" for rank, found in enumerate(digests))
        raise RankError(
            f"rank{'s' if len(differing) > 1 else ''} {', '.join(map(str, differing))} of {len(digests)} hold another "
            f"LoRA or optimizer state than rank 0 (sha256: {shown}); no checkpoint was written"
        )


def _sha256(tensors: dict[str, torch.Tensor]) -> "hashlib._Hash":
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest
