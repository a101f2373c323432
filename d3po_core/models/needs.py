"""Choose the fastest memory plan from what passes need: arithmetic, without a GPU.

A pass's peak grows by the same bytes per row, so passes of one and of two rows predict all others. A tenth of the
memory stays free for what this leaves out: fragments, the choice of kernels, latents being moved.
"""

from dataclasses import dataclass

from d3po_core.errors import D3POError
from d3po_core.models.memory import MemoryPlan

# Fewer image-steps at once leave a GPU partly idle. Recomputing costs a third more work, but more of them fit.
ENOUGH_ROWS = 4
# If so many image-steps fit beside the idle parts, these stay on the GPU.
ROOMY_ROWS = 32
MOST_ROWS, MOST_DECODED = 64, 16


@dataclass(frozen=True)
class Need:
    """Peak bytes of a kind of pass: a part that is always there, and a part per row."""

    fixed: int
    per_row: int

    def rows(self, room: int) -> int:
        """Return how many rows fit into so many bytes."""
        return max(0, (room - self.fixed) // max(1, self.per_row))

    def of(self, rows: int) -> int:
        """Return the peak of so many rows, bytes."""
        return self.fixed + rows * self.per_row


@dataclass(frozen=True)
class Needs:
    """Return the bytes that each kind of pass needs; None if not even one row fits.

    Attributes:
        plain: training.
        recomputing: training that recomputes activations.
        sampling: a denoising step.
        decoding: images from latents.
        idle: bytes of the parts that only some passes need.
        moments: bytes of the optimizer's state, which is not there yet.
    """

    plain: Need | None
    recomputing: Need | None
    sampling: Need | None
    decoding: Need | None
    idle: int
    moments: int


def chosen(needs: Needs, budget: int) -> MemoryPlan:
    """Return the fastest plan for a memory of ``budget`` bytes, of which a tenth stays free.

    Raises:
        D3POError: not even one image at a time fits.
    """
    room = budget - budget // 10

    def most(need: Need | None, taken: int = 0) -> int:
        return max(1, need.rows(room - taken)) if need else 0  # a pass of one row has fitted already

    plain, recomputing = most(needs.plain, needs.moments), most(needs.recomputing, needs.moments)
    stays = most(needs.plain, needs.moments + needs.idle) >= ROOMY_ROWS
    recomputes = plain < ENOUGH_ROWS and recomputing > plain
    training, trained = (needs.recomputing, recomputing) if recomputes else (needs.plain, plain)
    sampled, decoded = most(needs.sampling), most(needs.decoding)
    if training is None or needs.sampling is None or needs.decoding is None or not min(trained, sampled, decoded):
        raise D3POError(too_small(budget))
    trained, sampled, decoded = min(trained, MOST_ROWS), min(sampled, MOST_ROWS), min(decoded, MOST_DECODED)
    peak = max(
        training.of(trained) + needs.moments, needs.sampling.of(sampled), needs.decoding.of(decoded)
    ) + stays * needs.idle  # fmt: skip
    return MemoryPlan(stays, recomputes, trained, sampled, decoded, needs=peak)


def too_small(budget: int) -> str:
    """Return the message for a GPU with too little memory."""
    return (
        f"model.memory 'auto': one image at a time does not fit the {budget / 1e9:.1f} GB that this GPU gives; free "
        "some, set model.precision 'fp16', or take a smaller model"
    )
