"""Share one job among ranks, one per GPU: split the work, sum over ranks, and check that they agree.

A process gets its rank and the number of ranks from accelerate. With one process, nothing here computes anything.
"""

import hashlib
from collections.abc import Iterable

import torch
from accelerate import Accelerator

from d3po_core.errors import RankError


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
