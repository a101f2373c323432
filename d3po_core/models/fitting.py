"""Find a plan for the GPU's memory (``model.memory: auto``): measure small passes, extrapolate, try the result.

A pass's peak grows by the same bytes per row, so passes of one and of two rows predict all others. A tenth of the
memory stays free for what grows otherwise: fragments, the choice of kernels, latents on their way.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from d3po_core.errors import D3POError
from d3po_core.models.memory import PLANS, Card, MemoryPlan
from d3po_core.models.policy import Policy
from d3po_core.seeds import gaussian

# Passes of fewer image-steps leave a GPU partly idle; recomputing, by a third more work, then allows more at once.
ENOUGH_ROWS = 4
# With so many there is room for everything else.
ROOMY_ROWS = 32
MOST_ROWS, MOST_DECODED = 64, 16
GUIDANCE = 2.0  # any other than 1: a pass has two rows per image, as it most often has

Work = Callable[[Policy, int], None]


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
    """What each kind of pass needs; None if not even one row fits.

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


def fitted_plan(policy: Policy, card: Card) -> MemoryPlan:
    """Return the fastest plan that fits the GPU; the policy is left with it.

    Raises:
        D3POError: not even one image at a time fits.
    """
    budget = card.budget()
    plan = chosen(measured(policy, card), budget)
    plan = replace(
        plan,
        trained=_proven(policy, card, train, plan.trained, plan.recomputes),
        sampled=_proven(policy, card, sample, plan.sampled),
        decoded=_proven(policy, card, decode, plan.decoded),
    )
    policy.use(plan)
    return plan


def chosen(needs: Needs, budget: int) -> MemoryPlan:
    """Return the fastest plan for a memory of ``budget`` bytes, of which a tenth stays free.

    Raises:
        D3POError: not even one image at a time fits.
    """
    room = budget - budget // 10

    def most(need: Need | None, taken: int = 0) -> int:
        return max(1, need.rows(room - taken)) if need else 0  # one row has been passed, whatever is left then

    plain, recomputing = most(needs.plain, needs.moments), most(needs.recomputing, needs.moments)
    stays = most(needs.plain, needs.moments + needs.idle) >= ROOMY_ROWS
    recomputes = plain < ENOUGH_ROWS and recomputing > plain
    training, trained = (needs.recomputing, recomputing) if recomputes else (needs.plain, plain)
    sampled, decoded = most(needs.sampling), most(needs.decoding)
    if training is None or needs.sampling is None or needs.decoding is None or not min(trained, sampled, decoded):
        raise D3POError(_too_small(budget))
    trained, sampled, decoded = min(trained, MOST_ROWS), min(sampled, MOST_ROWS), min(decoded, MOST_DECODED)
    peak = max(
        training.of(trained) + needs.moments, needs.sampling.of(sampled), needs.decoding.of(decoded)
    ) + stays * needs.idle  # fmt: skip
    return MemoryPlan(stays, recomputes, trained, sampled, decoded, needs=peak)


def _too_small(budget: int) -> str:
    return (
        f"model.memory 'auto': one image at a time does not fit the {budget / 1e9:.1f} GB that this GPU gives; free "
        "some, set model.precision 'fp16', or take a smaller model"
    )


def measured(policy: Policy, card: Card) -> Needs:
    """Return what the policy's passes need, from passes of one and of two rows."""
    pipeline, family = policy.family.pipeline, policy.family
    idle = (getattr(pipeline, name, None) for name in ("vae", *family.TEXT_PARTS))
    weights = [parameter for _, parameter in policy.weights.parameters()]
    return Needs(
        plain=_need(policy, card, train, recomputes=False),
        recomputing=_need(policy, card, train, recomputes=True),
        sampling=_need(policy, card, sample),
        decoding=_need(policy, card, decode),
        idle=sum(value.nbytes for part in idle if part is not None for value in part.parameters()),
        moments=sum(2 * weight.nbytes for weight in weights),
    )


def _need(policy: Policy, card: Card, work: Work, *, recomputes: bool = False) -> Need | None:
    one = _peak(policy, card, work, 1, recomputes)
    two = _peak(policy, card, work, 2, recomputes)
    if one is None:
        return None
    # If two rows do not fit, a second takes more than there is.
    per_row = card.budget() if two is None else max(two - one, 1)
    return Need(one - per_row, per_row)


def _peak(policy: Policy, card: Card, work: Work, rows: int, recomputes: bool, passes: int = 2) -> int | None:
    """Return the peak bytes of the last of some passes, or None if it does not fit; the first chooses kernels."""
    policy.use(replace(PLANS["small"], recomputes=recomputes, decoded=rows))
    peak = None
    try:
        for _ in range(passes):
            card.start()
            work(policy, rows)
        peak = card.peak()
    except torch.OutOfMemoryError:
        pass
    for _, parameter in policy.weights.parameters():
        parameter.grad = None
    card.start()  # here, because the traceback no longer holds the failed pass's tensors
    return peak


def _proven(policy: Policy, card: Card, work: Work, most: int | None, recomputes: bool = False) -> int:
    """Return the largest number of rows, up to ``most``, that a pass has really been made with.

    Raises:
        D3POError: not even one fits.
    """
    rows = most or 1
    while _peak(policy, card, work, rows, recomputes, passes=1) is None:
        if rows == 1:
            raise D3POError(_too_small(card.budget()))
        rows = rows * 3 // 4
    return rows


def train(policy: Policy, rows: int) -> None:
    """Make a pass of so many image-steps and add its gradient to the weights'."""
    with torch.enable_grad():
        _predict(policy, rows).square().mean().backward()


def sample(policy: Policy, rows: int) -> None:
    """Make a denoising pass of so many images."""
    with torch.no_grad():
        _predict(policy, rows)


def decode(policy: Policy, rows: int) -> None:
    """Decode so many images."""
    policy.decode_on_device(_latents(policy, rows))


def _predict(policy: Policy, rows: int) -> torch.Tensor:
    t_B = torch.ones(rows, dtype=torch.long, device=policy.device)
    return policy.predict(_latents(policy, rows), t_B, policy.encode([""] * rows, GUIDANCE))


def _latents(policy: Policy, rows: int) -> torch.Tensor:
    return torch.stack([gaussian(row, *policy.latent_shape) for row in range(rows)]).to(policy.device)
