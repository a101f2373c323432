"""Training of a round: preferences in, optimizer updates out.

One policy forward an image and step serves every pair that the image is in. The reference's log_probs are the stored
ones of sampling (``round_start``) or one pass of the base model (``base``).

With several processes each takes its share of an update's work; the gradient and all that is counted are summed over
them once an update, after which every rank makes the same step.

Departures from the published code, beside the switches of the loss: ties are never batched, the ranks' gradients are
summed whole, and a non-finite loss stops the round before it reaches the weights.

Tensor names carry their shape: N images with a pair, T steps, R rows (an image at a step) of a micro-batch, P pairs.
"""

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from d3po_core.config import TrainConfig
from d3po_core.ddim import Schedule
from d3po_core.errors import D3POError, NonFiniteLossError
from d3po_core.loss import pair_loss
from d3po_core.packing import (
    Cell,
    PairedGroup,
    equal_rows,
    equal_starts,
    micro_batches,
    num_passes,
    pair_rows,
    shuffled_cells,
)
from d3po_core.policy import Policy
from d3po_core.ranks import own_share, sum_over_ranks
from d3po_core.rollout import replay_log_probs
from d3po_core.seeds import derive_seed, permutation
from d3po_core.sending import send


@dataclass(frozen=True)
class TrainingSet:
    """Trajectories of a round's paired images.

    Attributes:
        prompts: N prompts.
        latents_NTCHW: stored latents x_T ... x_0, ``[N, T+1, C, H, W]``.
        log_probs_NT: log_probs stored at sampling, ``[N, T]``.
        groups: pairs as (winner, loser, weight), indices into N.
    """

    prompts: list[str]
    latents_NTCHW: torch.Tensor
    log_probs_NT: torch.Tensor
    groups: list[PairedGroup]


@dataclass(frozen=True)
class Update:
    """What one optimizer update saw; ``per_step`` has a row a step: margin, pair_accuracy, kl, clip_fraction."""

    update: int
    epoch: int
    num_pairs: int
    loss: float
    margin: float
    pair_accuracy: float
    kl: float
    clip_fraction: float
    grad_norm: float
    seconds: float
    per_step: list[dict[str, Any]]


def make_optimizer(policy: Policy, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW over the trained weights.

    Raises:
        D3POError: the library of the optimizer that is asked for is not installed.
    """
    parameters = [parameter for _, parameter in policy.trainable_parameters()]
    kind = optimizer_class(config)
    if config.optimizer == "adamw8bit":
        for parameter in parameters:  # else it does so itself, and its moments keep the layout from before
            parameter.data = parameter.data.contiguous()
    return kind(parameters, lr=config.learning_rate, betas=config.adam_betas, weight_decay=config.weight_decay)


def optimizer_class(config: TrainConfig) -> Any:
    """The optimizer that the configuration asks for.

    Raises:
        D3POError: its library is not installed.
    """
    if config.optimizer == "adamw":
        return torch.optim.AdamW
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise D3POError(
            f"train.optimizer is 'adamw8bit', whose library cannot be imported ({' '.join(str(error).split())}); "
            "install the extra (pip install -e '.[adam8bit]'), or set it to 'adamw'"
        ) from None
    return AdamW8bit


def plan_updates(num_groups: int, config: TrainConfig, seed: int) -> list[tuple[int, list[int]]]:
    """Which groups each update trains on: (epoch, group indices), every group once an epoch.

    With fewer groups than updates, an update takes at least one group and there are fewer updates.
    """
    per_epoch = num_groups
    if config.updates_per_round != "one_per_group":
        per_epoch = min(num_groups, config.updates_per_round // config.epochs)
    plan = []
    for epoch in range(config.epochs):
        order = permutation(derive_seed(seed, "groups", epoch), num_groups)
        bounds = [round(i * num_groups / per_epoch) for i in range(per_epoch + 1)] if per_epoch else [0]
        plan += [(epoch, order[low:high]) for low, high in itertools.pairwise(bounds)]
    return plan


def train_updates(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    data: TrainingSet,
    config: TrainConfig,
    guidance_scale: float,
    seed: int,
    first_update: int = 0,
) -> Iterator[Update]:
    """Train on a round's preferences, yielding after every optimizer update.

    Args:
        policy: the policy; its weights are changed.
        optimizer: from make_optimizer, maybe with earlier state.
        schedule: the T steps that the trajectories were sampled with, on the policy's device.
        data: trajectories and pairs.
        config: learning settings.
        guidance_scale: the guidance that the trajectories were sampled with.
        seed: fixes the order of groups and steps.
        first_update: skip this many updates, already made by a run that was interrupted.

    Raises:
        NonFiniteLossError: a loss or gradient is not finite; the weights are those of the update before.
    """
    lesson = _Lesson(policy, schedule, data, config, guidance_scale)
    for update, (epoch, groups) in enumerate(plan_updates(len(data.groups), config, seed)):
        if update < first_update:
            continue
        started = time.perf_counter()
        chosen = [data.groups[g] for g in groups]
        tally = _take_gradient(lesson, optimizer, chosen, derive_seed(seed, "steps", update))
        grad_norm = _apply(policy, optimizer, config, tally, update)
        yield tally.summary(update, epoch, grad_norm, schedule, time.perf_counter() - started)


def _take_gradient(
    lesson: "_Lesson", optimizer: torch.optim.Optimizer, groups: list[PairedGroup], seed: int
) -> "_Tally":
    """The gradient of one update's mean loss, whatever the size of the micro-batches that fit into memory."""
    policy = lesson.policy
    num_pairs = sum(len(group.pairs) for group in groups)
    # Shared out before they are packed: a rank that halves its micro-batches does not change who does what.
    cells = shuffled_cells(groups, lesson.steps, seed)[own_share(policy.accelerator)]

    def attempt(rows: int) -> _Tally:
        optimizer.zero_grad(set_to_none=True)
        tally = _Tally(len(lesson.weight_T), num_pairs, policy.device)
        for micro_batch in micro_batches(cells, lesson.start_N, rows):
            _accumulate(lesson, micro_batch, tally, rows)
        return tally

    while True:
        tally = policy.training_rows.fit(lesson.config.micro_batch, attempt)
        policy.unscale()
        sum_over_ranks(policy.accelerator, [*_gradients(policy), tally.sums_7T])
        # An overflow on one rank is in every rank's sum: all decide alike.
        if not policy.shrink_loss_scale():
            return tally


def _gradients(policy: Policy) -> list[torch.Tensor]:
    """The gradients of all weights; those of a rank that had nothing to do are zeros."""
    gradients = []
    for _, parameter in policy.trainable_parameters():
        if parameter.grad is None and policy.accelerator.num_processes > 1:
            parameter.grad = torch.zeros_like(parameter)
        if parameter.grad is not None:
            gradients.append(parameter.grad)
    return gradients


class _Lesson:
    """What stays the same during a round's training: policy, steps and their weights, trajectories, reference."""

    def __init__(
        self, policy: Policy, schedule: Schedule, data: TrainingSet, config: TrainConfig, guidance_scale: float
    ) -> None:
        self.policy, self.schedule, self.config, self.guidance_scale = policy, schedule, config, guidance_scale
        self.prompts = data.prompts
        self.start_N = list(range(len(data.prompts)))
        if policy.config.precision != "no":
            self.start_N = equal_starts(data.groups, data.latents_NTCHW)
        # Small beside the activations, unless memory is what there is least of.
        keep_on = policy.device if policy.config.memory == "fast" else torch.device("cpu")
        self.latents_NTCHW = data.latents_NTCHW.to(keep_on)
        self.steps: list[int] = torch.nonzero(schedule.trainable_T.cpu()).flatten().tolist()
        elements = self.latents_NTCHW[0, 0].numel() if config.log_prob == "sum" and data.groups else 1
        self.weight_T = schedule.step_weights(config.timestep_weighting) * elements
        self.reference_NT = data.log_probs_NT.to(policy.device)
        if config.reference == "base" and data.groups:
            self.reference_NT = _base_log_probs(self, len(data.prompts))

    def log_probs(self, image_R: torch.Tensor, step_R: torch.Tensor) -> torch.Tensor:
        """log_prob ``[R]`` of stored steps under the policy as it is now."""
        images, steps = (send(x, self.latents_NTCHW.device) for x in (image_R, step_R))
        return replay_log_probs(
            self.policy,
            self.schedule,
            [self.prompts[i] for i in image_R.tolist()],
            self.latents_NTCHW[images, steps],
            self.latents_NTCHW[images, steps + 1],
            steps,
            self.guidance_scale,
            equal_rows(self.start_N, image_R, step_R),
        )


def _accumulate(lesson: _Lesson, cells: list[Cell], tally: "_Tally", rows: int) -> None:
    """Forward and backward of one micro-batch: one policy pass a row, then arithmetic for every pair."""
    policy = lesson.policy
    image_R = torch.tensor([i for group, _ in cells for i in group.images])
    step_R = torch.tensor([step for group, step in cells for _ in group.images])
    if sum(num_passes(cell, lesson.start_N) for cell in cells) <= rows:
        log_prob_R = lesson.log_probs(image_R, step_R)
        policy.backward(_loss(lesson, cells, log_prob_R, image_R, step_R, tally))
        return
    # A group that does not fit: the loss is a function of its log_probs, so their gradient is known after a pass that
    # keeps nothing, and a second pass takes it to the weights, some rows at a time.
    parts = list(zip(image_R.split(rows), step_R.split(rows), strict=True))
    with torch.no_grad():
        log_prob_R = torch.cat([lesson.log_probs(*part) for part in parts])
    log_prob_R.requires_grad_()
    loss = _loss(lesson, cells, log_prob_R, image_R, step_R, tally)
    (slope_R,) = torch.autograd.grad(loss, log_prob_R)
    for part, slope in zip(parts, slope_R.split(rows), strict=True):
        policy.backward((slope * lesson.log_probs(*part)).sum())


def _loss(
    lesson: _Lesson, cells: list[Cell], log_prob_R: torch.Tensor, image_R: torch.Tensor, step_R: torch.Tensor,
    tally: "_Tally",
) -> torch.Tensor:  # fmt: skip
    """A micro-batch's part of the update's mean loss; what is worth knowing goes into the tally."""
    device, config = lesson.policy.device, lesson.config
    winner_P, loser_P, weight_P, step_P = (send(values, device) for values in pair_rows(cells))
    image_R, step_R = send(image_R, device), send(step_R, device)
    raw_ratio_R = log_prob_R - lesson.reference_NT[image_R, step_R]
    result = pair_loss(
        lesson.weight_T[step_R] * raw_ratio_R,
        winner_P,
        loser_P,
        weight_P,
        beta=config.beta,
        clip=config.clip,
        clip_range=config.clip_range,
    )
    tally.add(step_P, step_R, result.loss_P.detach(), result.margin_P, result.clipped_P, raw_ratio_R.detach())
    # The mean over the update's pairs and steps, whatever the micro-batch that a pair fell into.
    return result.loss_P.sum() / (tally.num_pairs * len(lesson.steps))


def _apply(
    policy: Policy, optimizer: torch.optim.Optimizer, config: TrainConfig, tally: "_Tally", update: int
) -> float:
    """Clip the gradient and step the optimizer, unless something is not finite."""
    parameters = [parameter for _, parameter in policy.trainable_parameters()]
    grad_norm = float(policy.accelerator.clip_grad_norm_(parameters, config.max_grad_norm))
    loss = float(tally.loss_T.sum())
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        optimizer.zero_grad(set_to_none=True)
        raise NonFiniteLossError(
            f"update {update}: loss {loss}, gradient norm {grad_norm}; the round stops and the last checkpoint stays. "
            "Lower train.learning_rate or train.beta, use train.log_prob 'mean', or model.precision 'no'"
        )
    optimizer.step()
    policy.weights_changed()
    return grad_norm


@torch.no_grad()
def _base_log_probs(lesson: _Lesson, num_images: int) -> torch.Tensor:
    """log_probs ``[N, T]`` of the stored trajectories under the base model, one pass a row.

    Steps that are never trained on stay 0.
    """
    base_NT = torch.zeros_like(lesson.reference_NT)
    cells = torch.cartesian_prod(torch.arange(num_images), torch.tensor(lesson.steps))
    accelerator = lesson.policy.accelerator
    cells = cells[own_share(accelerator)]

    def attempt(rows: int) -> None:
        for chunk in cells.split(rows):
            image_R, step_R = chunk.unbind(1)
            base_NT[image_R, step_R] = lesson.log_probs(image_R, step_R)

    with lesson.policy.base():
        lesson.policy.training_rows.fit(lesson.config.micro_batch, attempt)
    sum_over_ranks(accelerator, [base_NT])  # every entry is one rank's, and 0 elsewhere
    return base_NT


class _Tally:
    """Sums over an update's micro-batches, a step each, on the policy's device: nobody waits for them early."""

    def __init__(self, num_steps: int, num_pairs: int, device: torch.device) -> None:
        self.num_pairs = num_pairs
        self.sums_7T = torch.zeros(7, num_steps, device=device)
        self.pairs_T, self.rows_T, *sums = self.sums_7T.unbind(0)
        self.loss_T, self.margin_T, self.right_T, self.clipped_T, self.kl_T = sums

    def add(
        self, step_P: torch.Tensor, step_R: torch.Tensor, loss_P: torch.Tensor, margin_P: torch.Tensor,
        clipped_P: torch.Tensor, log_ratio_R: torch.Tensor,
    ) -> None:  # fmt: skip
        """Add a micro-batch's pairs and rows."""
        # A margin of exactly 0 (the first update of a round, on-policy) is neither right nor wrong.
        right_P = 0.5 * (1 + margin_P.sign())
        for total_T, value_P in (
            (self.pairs_T, torch.ones_like(loss_P)),
            (self.loss_T, loss_P),
            (self.margin_T, margin_P),
            (self.right_T, right_P),
            (self.clipped_T, clipped_P),
        ):
            total_T.index_add_(0, step_P, value_P.float())
        # exp(r) - 1 - r: non-negative for every row, and on average the KL from reference to policy.
        self.kl_T.index_add_(0, step_R, torch.expm1(log_ratio_R) - log_ratio_R)
        self.rows_T.index_add_(0, step_R, torch.ones_like(log_ratio_R))

    def summary(self, update: int, epoch: int, grad_norm: float, schedule: Schedule, seconds: float) -> Update:
        """Means over pairs (loss, margin, accuracy, clipped) and over images (KL, nats per element)."""
        pairs, rows = self.pairs_T.sum().item(), self.rows_T.sum().item()
        pairs_T, margin_T, right_T, kl_T, rows_T, clipped_T = (
            sums_T.cpu()
            for sums_T in (self.pairs_T, self.margin_T, self.right_T, self.kl_T, self.rows_T, self.clipped_T)
        )
        timesteps = schedule.timesteps_T.round().long().tolist()
        per_step = [
            {
                "update": update,
                "step": step,
                "timestep": timesteps[step],
                "margin": (margin_T[step] / pairs_T[step]).item(),
                "pair_accuracy": (right_T[step] / pairs_T[step]).item(),
                "kl": (kl_T[step] / rows_T[step]).item(),
                "clip_fraction": (clipped_T[step] / pairs_T[step]).item(),
            }
            for step in torch.nonzero(pairs_T).flatten().tolist()
        ]
        return Update(
            update=update,
            epoch=epoch,
            num_pairs=self.num_pairs,
            loss=self.loss_T.sum().item() / pairs,
            margin=self.margin_T.sum().item() / pairs,
            pair_accuracy=self.right_T.sum().item() / pairs,
            kl=self.kl_T.sum().item() / rows,
            clip_fraction=self.clipped_T.sum().item() / pairs,
            grad_norm=grad_norm,
            seconds=seconds,
            per_step=per_step,
        )
