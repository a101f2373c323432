"""Train a round: preferences in, optimizer updates out.

One policy forward per image and step serves every pair that the image is in. The reference's log_probs come from
sampling (``round_start``) or from one pass of the base model (``base``).

An update's metrics describe the policy before that update. After a round's last update, ``measure_learned`` measures
what the round taught, on a share of the same pairs.

With several processes, each takes its share of an update's work. Gradients and counts are summed over ranks once per
update, and then every rank makes the same step.

Departures from the published code, beside the loss settings: ties are never batched, the ranks' gradients are summed
whole, and a non-finite loss stops the round before it reaches the weights.

Tensor names carry their shape: N images with a pair, T steps, R rows (one image at one step) of a micro-batch, P pairs.
"""

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from d3po_core.config import TrainConfig
from d3po_core.denoising.ddim import Schedule
from d3po_core.devices import send
from d3po_core.errors import NonFiniteLossError
from d3po_core.models.policy import Policy
from d3po_core.processes.ranks import own_share, sum_over_ranks
from d3po_core.seeds import derive_seed, permutation
from d3po_core.training.lesson import Lesson, TrainingSet, trainable_steps
from d3po_core.training.objectives import OBJECTIVES
from d3po_core.training.optimizer import drowned_share
from d3po_core.training.packing import (
    Cell,
    PairedGroup,
    measured_cells,
    micro_batches,
    num_passes,
    pair_rows,
    shuffled_cells,
)
from d3po_core.training.update import Seen, UpdateTally


@dataclass(frozen=True)
class Update:
    """One optimizer update and its metrics; ``_before`` fields describe the policy before its weights moved.

    ``drowned`` is the share of the trained weights whose gradient was below AdamW's eps. ``per_step`` has one row per
    step. For the others see ``d3po_core.training.update.Seen``.
    """

    update: int
    epoch: int
    num_pairs: int
    loss: float
    margin_before: float
    pair_accuracy_before: float
    kl_before: float
    clip_fraction: float
    grad_norm: float
    drowned: float
    seconds: float
    per_step: list[dict[str, Any]]


def plan_updates(num_groups: int, config: TrainConfig, seed: int) -> list[tuple[int, list[int]]]:
    """Return (epoch, group indices) for each update; every group comes once per epoch.

    Every update has at least one group, so few groups mean fewer updates than configured.
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
    """Train on a round's preferences and yield after every optimizer update.

    Args:
        policy: the policy; its weights are changed.
        optimizer: from make_optimizer, possibly with earlier state.
        schedule: the T steps that the trajectories were sampled with, on the policy's device.
        data: trajectories and pairs.
        config: learning settings.
        guidance_scale: the guidance that the trajectories were sampled with.
        seed: fixes the order of groups and steps.
        first_update: skip this many updates, which an interrupted run has already made.

    Raises:
        NonFiniteLossError: a loss or gradient is not finite; the weights stay those of the previous update.
    """
    lesson = Lesson(policy, schedule, data, config, guidance_scale)
    for update, (epoch, groups) in enumerate(plan_updates(len(data.groups), config, seed)):
        if update < first_update:
            continue
        started = time.perf_counter()
        chosen = [data.groups[g] for g in groups]
        tally = _take_gradient(lesson, optimizer, chosen, derive_seed(seed, "steps", update))
        grad_norm, drowned = _apply(policy, optimizer, config, tally, update)
        seen = tally.seen()
        yield Update(
            update=update,
            epoch=epoch,
            num_pairs=tally.num_pairs,
            loss=seen.loss,
            margin_before=seen.margin,
            pair_accuracy_before=seen.pair_accuracy,
            kl_before=seen.kl,
            clip_fraction=seen.clip_fraction,
            grad_norm=grad_norm,
            drowned=drowned,
            seconds=time.perf_counter() - started,
            per_step=tally.per_step(update, schedule),
        )


def measure_learned(
    policy: Policy, schedule: Schedule, data: TrainingSet, config: TrainConfig, guidance_scale: float, seed: int
) -> Seen | None:
    """Return the trained policy's metrics on the round's pairs, or None if nothing is measured.

    Every group passes once more at a share of its steps (``train.measured_share``). All steps count alike; the seed
    decides which steps a group gets. A pass costs a third of training on it. Arguments as in ``train_updates``.
    """
    cells = measured_cells(data.groups, trainable_steps(schedule), config.measured_share, seed)
    if not cells:
        return None
    rows_R2 = torch.tensor([(image, step) for group, step in cells for image in group.images])
    lesson = Lesson(policy, schedule, data, config, guidance_scale, rows_R2)
    own = cells[own_share(policy.accelerator)]

    def attempt(rows: int) -> UpdateTally:
        tally = UpdateTally(len(lesson.weight_T), sum(len(group.pairs) for group, _ in cells), policy.device)
        for micro_batch in micro_batches(own, lesson.start_N, rows):
            image_R, step_R = _rows(micro_batch)
            # Gradients are recorded but not used: no_grad would compile the network again for this alone.
            replayed = [_detached(lesson.replay(*part)) for part in _parts(image_R, step_R, rows)]
            log_prob_R, kl_R = (torch.cat(values) for values in zip(*replayed, strict=True))
            _loss(lesson, micro_batch, log_prob_R, kl_R, image_R, step_R, tally)
        return tally

    tally = policy.training_rows.fit(config.micro_batch, attempt)
    sum_over_ranks(policy.accelerator, [tally.sums_7T])
    return tally.seen()


def _take_gradient(
    lesson: Lesson, optimizer: torch.optim.Optimizer, groups: list[PairedGroup], seed: int
) -> UpdateTally:
    """Compute the gradient of one update's mean loss, independent of the micro-batch size that fits in memory."""
    policy = lesson.policy
    num_pairs = sum(len(group.pairs) for group in groups)
    # Split over ranks before packing, so a rank that halves its micro-batches keeps the same cells.
    cells = shuffled_cells(groups, lesson.steps, seed)[own_share(policy.accelerator)]

    def attempt(rows: int) -> UpdateTally:
        optimizer.zero_grad(set_to_none=True)
        tally = UpdateTally(len(lesson.weight_T), num_pairs, policy.device)
        for micro_batch in micro_batches(cells, lesson.start_N, rows):
            _accumulate(lesson, micro_batch, tally, rows)
        return tally

    while True:
        tally = policy.training_rows.fit(lesson.config.micro_batch, attempt)
        policy.loss_scale.unscale()
        sum_over_ranks(policy.accelerator, [*_gradients(policy), tally.sums_7T])
        # An overflow on one rank shows in every rank's sum, so all ranks decide alike.
        if not policy.loss_scale.shrink():
            return tally


def _gradients(policy: Policy) -> list[torch.Tensor]:
    """Return the gradients of all weights; zeros on a rank that had no work."""
    gradients = []
    for _, parameter in policy.weights.parameters():
        if parameter.grad is None and policy.accelerator.num_processes > 1:
            parameter.grad = torch.zeros_like(parameter)
        if parameter.grad is not None:
            gradients.append(parameter.grad)
    return gradients


def _accumulate(lesson: Lesson, cells: list[Cell], tally: UpdateTally, rows: int) -> None:
    """Run forward and backward of one micro-batch: one policy pass per row, then arithmetic per pair."""
    policy = lesson.policy
    image_R, step_R = _rows(cells)
    if sum(num_passes(cell, lesson.start_N) for cell in cells) <= rows:
        log_prob_R, kl_R = lesson.replay(image_R, step_R)
        policy.loss_scale.backward(_loss(lesson, cells, log_prob_R, kl_R, image_R, step_R, tally))
        return
    # The group does not fit. A first pass without activations gives the loss's gradient at the log_probs; a second
    # pass carries it to the weights, some rows at a time.
    parts = _parts(image_R, step_R, rows)
    with torch.no_grad():
        replayed = [lesson.replay(*part) for part in parts]
        log_prob_R, kl_R = (torch.cat(values) for values in zip(*replayed, strict=True))
    log_prob_R.requires_grad_()
    loss = _loss(lesson, cells, log_prob_R, kl_R, image_R, step_R, tally)
    (slope_R,) = torch.autograd.grad(loss, log_prob_R)
    for part, slope in zip(parts, slope_R.split(rows), strict=True):
        policy.loss_scale.backward((slope * lesson.replay(*part)[0]).sum())


def _rows(cells: list[Cell]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return image and step of every row of a micro-batch, each ``[R]``."""
    image_R = torch.tensor([i for group, _ in cells for i in group.images])
    return image_R, torch.tensor([step for group, step in cells for _ in group.images])


def _parts(image_R: torch.Tensor, step_R: torch.Tensor, rows: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Split rows into parts that each pass through the network at once."""
    return list(zip(image_R.split(rows), step_R.split(rows), strict=True))


def _detached(values: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(value.detach() for value in values)


def _loss(
    lesson: Lesson, cells: list[Cell], log_prob_R: torch.Tensor, kl_R: torch.Tensor, image_R: torch.Tensor,
    step_R: torch.Tensor, tally: UpdateTally,
) -> torch.Tensor:  # fmt: skip
    """Return a micro-batch's part of the update's mean loss, and add its metrics to the tally."""
    device, config = lesson.policy.device, lesson.config
    winner_P, loser_P, weight_P, step_P = (send(values, device) for values in pair_rows(cells))
    image_R, step_R = send(image_R, device), send(step_R, device)
    log_ratio_R = lesson.weight_T[step_R] * (log_prob_R - lesson.reference_NT[image_R, step_R])
    result = OBJECTIVES[config.objective](log_ratio_R, winner_P, loser_P, weight_P, config)
    tally.add(step_P, step_R, result, kl_R)
    # The mean is over the update's pairs and steps, so packing does not change it.
    return result.loss_P.sum() / (tally.num_pairs * len(lesson.steps))


def _apply(
    policy: Policy, optimizer: torch.optim.Optimizer, config: TrainConfig, tally: UpdateTally, update: int
) -> tuple[float, float]:
    """Clip the gradient and step the optimizer if all is finite; return gradient norm and drowned share."""
    parameters = [parameter for _, parameter in policy.weights.parameters()]
    grad_norm = float(policy.accelerator.clip_grad_norm_(parameters, config.max_grad_norm))
    loss = float(tally.loss_T.sum())
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        optimizer.zero_grad(set_to_none=True)
        raise NonFiniteLossError(
            f"update {update}: loss {loss}, gradient norm {grad_norm}; the round stops and the last checkpoint stays. "
            "Lower train.learning_rate or train.beta, use train.log_prob 'mean', or model.precision 'no'"
        )
    drowned = drowned_share((parameter.grad for parameter in parameters), config.adam_eps)
    optimizer.step()
    policy.weights.changed()
    return grad_norm, drowned
