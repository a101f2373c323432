"""Train a round: preferences in, optimizer updates out, for every objective.

One policy forward per image and step serves every pair that the image is in. D3PO's reference log_probs come from
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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from d3po_core.config import TrainConfig
from d3po_core.denoising.ddim import Schedule
from d3po_core.errors import NonFiniteLossError
from d3po_core.models.policy import Policy
from d3po_core.processes.ranks import own_share, sum_over_ranks
from d3po_core.seeds import derive_seed, permutation
from d3po_core.training.final_images import FinalImageLesson, RoundStart
from d3po_core.training.lesson import Lesson, Signals, TrainingSet, TrajectoryLesson, trainable_steps
from d3po_core.training.objectives import make_objective
from d3po_core.training.objectives.d3po import D3po
from d3po_core.training.optimizer import drowned_share
from d3po_core.training.packing import (
    Cell,
    PairedGroup,
    measured_cells,
    micro_batches,
    num_passes,
    rows_of,
)
from d3po_core.training.update import Seen, UpdateTally

# Images of one size, and the steps that they were sampled with.
Part = tuple[Schedule, TrainingSet]
# What an update learns from images of one size.
Work = tuple[Lesson, list[PairedGroup]]


@dataclass(frozen=True)
class Update:
    """One optimizer update and its metrics; ``_before`` fields describe the policy before its weights moved.

    ``num_pairs`` counts the pairs of its images, ``num_units`` what the loss is a mean over: pairs, or images.
    ``drowned`` is the share of the trained weights whose gradient was below AdamW's eps. ``per_step`` has one row per
    step. For the others see ``d3po_core.training.update.Seen``.
    """

    update: int
    epoch: int
    num_pairs: int
    num_units: int
    loss: float
    margin_before: float | None
    pair_accuracy_before: float | None
    winner_error_before: float | None
    loser_error_before: float | None
    kl_before: float | None
    clip_fraction: float
    gradient_factor: float
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
    start: RoundStart | None = None,
    more: Sequence[Part] = (),
) -> Iterator[Update]:
    """Train on a round's labels and yield after every optimizer update.

    Args:
        policy: the policy; its weights are changed.
        optimizer: from make_optimizer, possibly with earlier state.
        schedule: the T steps that the trajectories were sampled with, on the policy's device.
        data: trajectories and labels.
        config: learning settings.
        guidance_scale: the guidance that the trajectories were sampled with.
        seed: fixes the order of groups and steps, and fresh noise.
        first_update: skip this many updates, which an interrupted run has already made.
        start: the weights that the round started from; the policy's by default.
        more: steps and data of images of other sizes; a micro-batch has rows of one size.

    Raises:
        NonFiniteLossError: a loss or gradient is not finite; the weights stay those of the previous update.
    """
    parts = [(schedule, data), *more]
    lessons = [_lesson(policy, *part, config, guidance_scale, start) for part in parts]
    every = [(lesson, group) for lesson in lessons for group in lesson.data.groups]
    for update, (epoch, groups) in enumerate(plan_updates(len(every), config, seed)):
        if update < first_update:
            continue
        started = time.perf_counter()
        chosen = [every[g] for g in groups]
        tally = _take_gradient(_by_lesson(chosen, lessons), optimizer, derive_seed(seed, "steps", update))
        grad_norm, drowned = _apply(policy, optimizer, config, tally, update)
        seen = tally.seen()
        yield Update(
            update=update,
            epoch=epoch,
            num_pairs=sum(len(group.pairs) for _, group in chosen),
            num_units=tally.num_units,
            loss=seen.loss,
            margin_before=seen.margin,
            pair_accuracy_before=seen.pair_accuracy,
            winner_error_before=seen.winner_error,
            loser_error_before=seen.loser_error,
            kl_before=seen.kl,
            clip_fraction=seen.clip_fraction,
            gradient_factor=seen.gradient_factor,
            grad_norm=grad_norm,
            drowned=drowned,
            seconds=time.perf_counter() - started,
            per_step=tally.per_step(update, schedule),
        )


def _lesson(
    policy: Policy, schedule: Schedule, data: TrainingSet, config: TrainConfig, guidance_scale: float,
    start: RoundStart | None,
) -> Lesson:  # fmt: skip
    """Return what the objective learns from: stored steps or final images."""
    objective = make_objective(config)
    if objective.source == "trajectory" or not data.groups:
        return TrajectoryLesson(policy, schedule, data, config, objective, guidance_scale)
    return FinalImageLesson(policy, schedule, data, config, objective, guidance_scale, start)


def _by_lesson(chosen: list[tuple[Lesson, PairedGroup]], lessons: list[Lesson]) -> list[Work]:
    """Return an update's groups with the lesson that each belongs to; lessons without any are left out."""
    work = [(lesson, [group for own, group in chosen if own is lesson]) for lesson in lessons]
    return [(lesson, groups) for lesson, groups in work if groups]


def measure_learned(
    policy: Policy, schedule: Schedule, data: TrainingSet, config: TrainConfig, guidance_scale: float, seed: int,
    more: Sequence[Part] = (),
) -> Seen | None:  # fmt: skip
    """Return the trained policy's metrics on the round's pairs, or None if nothing is measured.

    Every sampled group with a pair passes once more at a share of its steps (``train.measured_share``); groups of a
    data set have no steps to measure. All steps count alike; the seed decides which steps a group gets. A pass costs a
    third of training on it. Metrics are those of D3PO on the stored steps whatever was learned, so that objectives can
    be compared. Arguments as in ``train_updates``.
    """
    work: list[tuple[Lesson, list[Cell]]] = []
    for steps, part in [(schedule, data), *more]:
        groups = [group for group in part.groups if group.pairs and not part.imported.intersection(group.images)]
        cells = measured_cells(groups, trainable_steps(steps), config.measured_share, seed)
        if cells:
            rows_R2 = torch.tensor([(image, step) for group, step in cells for image in group.images])
            work.append((TrajectoryLesson(policy, steps, part, config, D3po(), guidance_scale, rows_R2), cells))
    if not work:
        return None
    num_pairs = sum(len(group.pairs) for _, cells in work for group, _ in cells)
    own = [(lesson, cells[own_share(policy.accelerator)]) for lesson, cells in work]

    def attempt(rows: int) -> UpdateTally:
        tally = UpdateTally(len(schedule.timesteps_T), num_pairs, policy.device)
        for lesson, micro_batch in _micro_batches(own, rows):
            _loss(lesson, micro_batch, _without_gradient(lesson, micro_batch, rows), tally)
        return tally

    tally = policy.training_rows.fit(config.micro_batch, attempt)
    sum_over_ranks(policy.accelerator, [tally.sums_KT])
    return tally.seen()


def _micro_batches(work: list[tuple[Lesson, list[Cell]]], rows: int) -> Iterator[tuple[Lesson, list[Cell]]]:
    """Pack each lesson's cells into micro-batches, so that all rows of one have one size."""
    for lesson, cells in work:
        for micro_batch in micro_batches(cells, lesson.start_N, rows):
            yield lesson, micro_batch


def _take_gradient(chosen: list[Work], optimizer: torch.optim.Optimizer, seed: int) -> UpdateTally:
    """Compute the gradient of one update's mean loss, independent of the micro-batch size that fits in memory."""
    first, num_units = chosen[0][0], sum(lesson.units(groups) for lesson, groups in chosen)
    policy, config, objective = first.policy, first.config, first.objective
    # Split over ranks before packing, so a rank that halves its micro-batches keeps the same cells.
    work = [(lesson, lesson.cells(groups, seed)[own_share(policy.accelerator)]) for lesson, groups in chosen]
    for lesson, cells in work:
        policy.training_rows.fit(config.micro_batch, partial(lesson.begin, cells, seed))
    if objective.needs_mean():
        mean = _mean_of_update(work, num_units * first.steps_per_image)
        for lesson, _ in work:
            lesson.update_mean = mean

    def attempt(rows: int) -> UpdateTally:
        optimizer.zero_grad(set_to_none=True)
        of_pairs = objective.takes() == "pairs"
        tally = UpdateTally(len(first.schedule.timesteps_T), num_units, policy.device, of_pairs)
        for lesson, micro_batch in _micro_batches(work, rows):
            _accumulate(lesson, micro_batch, tally, rows)
        return tally

    while True:
        tally = policy.training_rows.fit(config.micro_batch, attempt)
        policy.loss_scale.unscale()
        sum_over_ranks(policy.accelerator, [*_gradients(policy), tally.sums_KT])
        # An overflow on one rank shows in every rank's sum, so all ranks decide alike.
        if not policy.loss_scale.shrink():
            return tally


def _mean_of_update(work: list[tuple[Lesson, list[Cell]]], count: int) -> torch.Tensor:
    """Return the mean of the objective's statistic over all ranks' units and steps, a number."""
    first = work[0][0]
    policy = first.policy

    def attempt(rows: int) -> torch.Tensor:
        total = torch.zeros(1, device=policy.device)
        for lesson, micro_batch in _micro_batches(work, rows):
            seen = lesson.rows(micro_batch, _without_gradient(lesson, micro_batch, rows))
            total += lesson.objective.statistic(seen).sum()
        return total

    total = policy.training_rows.fit(first.config.micro_batch, attempt)
    sum_over_ranks(policy.accelerator, [total])
    return total[0] / count


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
    """Run forward and backward of one micro-batch: one policy pass per row, then arithmetic per pair or image."""
    policy = lesson.policy
    if sum(num_passes(cell, lesson.start_N) for cell in cells) <= rows:
        policy.loss_scale.backward(_loss(lesson, cells, lesson.replay(*rows_of(cells)), tally))
        return
    # The group does not fit. A first pass without activations gives the loss's gradient at what the network says; a
    # second pass carries it to the weights, some rows at a time.
    parts = _parts(cells, rows)
    with torch.no_grad():
        signals = tuple(torch.cat(values) for values in zip(*(lesson.replay(*part) for part in parts), strict=True))
    signals = tuple(signal.requires_grad_() for signal in signals)
    slopes = torch.autograd.grad(_loss(lesson, cells, signals, tally), signals, allow_unused=True)
    used = [place for place, slope in enumerate(slopes) if slope is not None]
    split = [slope.split(rows) for slope in slopes if slope is not None]
    for number, part in enumerate(parts):
        replayed = lesson.replay(*part)
        products = [(slope[number] * replayed[place]).sum() for slope, place in zip(split, used, strict=True)]
        policy.loss_scale.backward(torch.stack(products).sum() if len(products) > 1 else products[0])


def _without_gradient(lesson: Lesson, cells: list[Cell], rows: int) -> Signals:
    """Return what the network says of a micro-batch; gradients are recorded but not used.

    Under no_grad, a compiled network would be compiled again for this alone.
    """
    replayed = [tuple(value.detach() for value in lesson.replay(*part)) for part in _parts(cells, rows)]
    return tuple(torch.cat(values) for values in zip(*replayed, strict=True))


def _parts(cells: list[Cell], rows: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Split a micro-batch's rows, image and step, into parts that each pass through the network at once."""
    image_R, step_R = rows_of(cells)
    return list(zip(image_R.split(rows), step_R.split(rows), strict=True))


def _loss(lesson: Lesson, cells: list[Cell], signals: Signals, tally: UpdateTally) -> torch.Tensor:
    """Return a micro-batch's part of the update's mean loss, and add its metrics to the tally."""
    rows = lesson.rows(cells, signals)
    losses = lesson.objective.losses(rows, lesson.config)
    tally.add(rows, losses)
    # The mean is over the update's units and their steps, so packing does not change it.
    return losses.loss_U.sum() / (tally.num_units * lesson.steps_per_image)


def _apply(
    policy: Policy, optimizer: torch.optim.Optimizer, config: TrainConfig, tally: UpdateTally, update: int
) -> tuple[float, float]:
    """Clip the gradient and step the optimizer if all is finite; return gradient norm and drowned share."""
    parameters = [parameter for _, parameter in policy.weights.parameters()]
    grad_norm = float(policy.accelerator.clip_grad_norm_(parameters, config.max_grad_norm))
    loss = float(tally.sum_T["loss"].sum())
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
