"""Compile a network block by block: a slower start for faster passes.

Blocks of one class and shape share compiled code, which is also kept on disk (``TORCHINDUCTOR_CACHE_DIR``), so a second
process starts faster. Code is compiled for exact shapes, so batches are padded to sizes already seen.
"""

import math

import torch

# One entry per shape, with and without gradient, LoRA on and off.
MOST_VERSIONS = 128
# Force channels-last: by default Inductor passes gradients in the other layout, and every convolution's backward pass
# starts with a copy.
OPTIONS = {"force_layout_optimization": True}


def compile_regions(network: torch.nn.Module, classes: tuple[str, ...], backend: str = "inductor") -> int:
    """Compile all blocks of the named classes in place; return their number."""
    torch._dynamo.config.recompile_limit = MOST_VERSIONS
    torch._dynamo.config.accumulated_recompile_limit = 16 * MOST_VERSIONS
    blocks = [module for module in network.modules() if type(module).__name__ in classes]
    for block in blocks:
        compile_whole(block, backend)
    return len(blocks)


def compile_whole(network: torch.nn.Module, backend: str = "inductor") -> None:
    """Compile a network in place, as a whole."""
    network.compile(dynamic=False, backend=backend, options=OPTIONS if backend == "inductor" else None)


class BatchSizes:
    """The batch sizes that code was compiled for, or algorithms were chosen for; with and without gradient apart.

    Args:
        ratio: a batch grows to fewer than this many times its rows. Compiling for one more size costs minutes, choosing
            algorithms costs about as much as a pass.
    """

    def __init__(self, ratio: float = math.inf) -> None:
        self.ratio = ratio
        self._seen: dict[bool, set[int]] = {True: set(), False: set()}

    def fitting(self, rows: int, most: int | None = None) -> int:
        """Return the smallest known size of at least ``rows``; if there is none, remember and return ``rows``.

        Args:
            rows: the batch.
            most: the most rows that fit into memory; None for any number.
        """
        seen, end = self._seen[torch.is_grad_enabled()], self.ratio * rows
        size = min((size for size in seen if rows <= size < end and (most is None or size <= most)), default=rows)
        seen.add(size)
        return size


def pad_rows(tensor_B: torch.Tensor, size: int) -> torch.Tensor:
    """Pad a batch to ``size`` rows by repeating the first row."""
    missing = size - len(tensor_B)
    return torch.cat([tensor_B, tensor_B[:1].expand(missing, *tensor_B.shape[1:])]) if missing else tensor_B
