"""Find a memory plan (``model.memory: auto``): measure small passes, extrapolate, try the result."""

from collections.abc import Callable
from dataclasses import replace

import torch

from d3po_core.errors import D3POError
from d3po_core.models.memory import PLANS, Card, MemoryPlan
from d3po_core.models.needs import Need, Needs, chosen, too_small
from d3po_core.models.policy import Policy
from d3po_core.seeds import gaussian

GUIDANCE = 2.0  # any value but 1: then a pass has two rows per image, the usual case

Work = Callable[[Policy, int], None]


def fitted_plan(policy: Policy, card: Card) -> MemoryPlan:
    """Return the fastest memory plan that fits the GPU; the policy then uses it.

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
    # If two rows do not fit, count a row as the whole budget.
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
    """Return the largest tried number of rows, up to ``most``, that fits.

    Raises:
        D3POError: not even one fits.
    """
    rows = most or 1
    while _peak(policy, card, work, rows, recomputes, passes=1) is None:
        if rows == 1:
            raise D3POError(too_small(card.budget()))
        rows = rows * 3 // 4
    return rows


def train(policy: Policy, rows: int) -> None:
    """Make a pass of ``rows`` image-steps and add its gradient to the weights'."""
    with torch.enable_grad():
        _predict(policy, rows).square().mean().backward()


def sample(policy: Policy, rows: int) -> None:
    """Make a denoising pass of ``rows`` images."""
    with torch.no_grad():
        _predict(policy, rows)


def decode(policy: Policy, rows: int) -> None:
    """Decode ``rows`` images."""
    policy.decode_on_device(_latents(policy, rows))


def _predict(policy: Policy, rows: int) -> torch.Tensor:
    t_B = torch.ones(rows, dtype=torch.long, device=policy.device)
    guidance = 1.0 if policy.family.guidance == "none" else GUIDANCE
    return policy.predict(_latents(policy, rows), t_B, policy.encode([""] * rows, guidance))


def _latents(policy: Policy, rows: int) -> torch.Tensor:
    return torch.stack([gaussian(row, *policy.largest_latent) for row in range(rows)]).to(policy.device)
