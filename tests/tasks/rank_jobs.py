"""Jobs for tests: they run on workers, which import them by name. Not tests by themselves."""

from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import gather_object

from d3po_core.config import CampaignConfig
from d3po_core.models.checkpoint import load_round
from d3po_core.models.loaded import loaded_policy
from d3po_core.models.policy import Policy
from d3po_core.models.weights import weights_sha256
from d3po_core.processes.job import GangJob, Tell
from d3po_core.training import job as training
from d3po_core.training.job import TRAIN
from d3po_core.training.lesson import TrainingSet
from d3po_core.training.objectives import make_objective
from d3po_core.training.trainer import train_updates
from d3po_core.training.training_set import load_training_sets, training_seed
from tests.core.sampling.drawing import stir_lora


def gradient(config: CampaignConfig, round_number: int, tell: Tell) -> dict[str, Any]:
    """The gradient of a round's first update, by a LoRA that matters, and what the update saw."""
    labels = make_objective(config.train).takes()
    (data,) = load_training_sets(config.folder, round_number, labels=labels)
    return _gradient(config, loaded_policy(config), data, steps=None)


def gradient_of_one_cell(config: CampaignConfig, round_number: int, tell: Tell) -> dict[str, Any]:
    """The same of one group at one step: there is nothing to do for a second rank."""
    (data,) = load_training_sets(config.folder, round_number)
    return _gradient(config, loaded_policy(config), replace(data, groups=data.groups[:1]), steps=1)


def gradient_short_of_memory(config: CampaignConfig, round_number: int, tell: Tell) -> dict[str, Any]:
    """The same when a second rank has room for two rows only."""
    policy = loaded_policy(config)
    whole = policy.training_rows._most
    if policy.accelerator.process_index == 1:
        policy.training_rows._most = 2
    try:
        return gradient(config, round_number, tell)
    finally:
        policy.training_rows._most = whole


def gradient_overflowing_once(config: CampaignConfig, round_number: int, tell: Tell) -> dict[str, Any]:
    """The same when the second rank's gradient overflows at the first loss scale."""
    policy = loaded_policy(config)
    backward = policy.loss_scale.backward

    def overflow(loss: torch.Tensor) -> None:
        too_large = policy.accelerator.process_index == 1 and policy.loss_scale.factor == policy.loss_scale.first
        backward(loss * torch.inf if too_large else loss)

    policy.loss_scale.backward = overflow  # type: ignore[method-assign]
    try:
        return gradient(config, round_number, tell)
    finally:
        del policy.loss_scale.backward


def _gradient(config: CampaignConfig, policy: Policy, data: TrainingSet, steps: int | None) -> dict[str, Any]:
    load_round(config.folder, 0, policy)
    stir_lora(policy, seed=1)
    schedule = policy.schedule(config.sample.num_steps, config.sample.eta)
    if steps is not None:
        trained = torch.arange(config.sample.num_steps) < steps  # a step without noise is not trained on
        schedule = replace(schedule, sigma_T=schedule.sigma_T * trained.to(policy.device))
    still = torch.optim.SGD([parameter for _, parameter in policy.weights.parameters()], lr=0.0)
    updates = train_updates(policy, still, schedule, data, config.train, 1.0, training_seed(config, 1))
    update = next(updates)
    flat = torch.cat([parameter.grad.flatten() for _, parameter in policy.weights.parameters()])
    seen = {key: getattr(update, key) for key in ("loss", "margin_before", "kl_before", "grad_norm", "num_pairs")}
    known = [{key: value for key, value in row.items() if value is not None} for row in (seen, *update.per_step)]
    return {
        "gradient": flat.tolist(),
        "seen": known[0],
        "per_step": known[1:],
        "loss_scale": policy.loss_scale.factor,
    }


def digests_of_lora(config: CampaignConfig, round_number: int, tell: Tell) -> list[str]:
    """What every rank holds."""
    policy = loaded_policy(config)
    own = config.folder / f"of-rank-{policy.accelerator.process_index}"
    policy.weights.save(own)
    found: list[str] = gather_object([weights_sha256(own)])
    return found


def train_apart(config: CampaignConfig, round_number: int, tell: Tell) -> Any:
    """Training in which rank 1 learns a little faster."""
    make = training.make_optimizer

    def faster(policy: Policy, settings: Any) -> Any:
        factor = 1.001 if policy.accelerator.process_index == 1 else 1.0
        return make(policy, settings.model_copy(update={"learning_rate": factor * settings.learning_rate}))

    training.make_optimizer = faster
    try:
        return training.train_checkpoint(config, round_number, tell)
    finally:
        training.make_optimizer = make


def _gang(name: str, run: Any) -> GangJob:
    return GangJob(f"tests.tasks.rank_jobs:{name}", TRAIN.needs, lambda c, r, tell, kept: run(c, r, tell), TRAIN.keep)


GRADIENT = _gang("GRADIENT", gradient)
ONE_CELL = _gang("ONE_CELL", gradient_of_one_cell)
SHORT_OF_MEMORY = _gang("SHORT_OF_MEMORY", gradient_short_of_memory)
OVERFLOWING_ONCE = _gang("OVERFLOWING_ONCE", gradient_overflowing_once)
DIGESTS = _gang("DIGESTS", digests_of_lora)
APART = _gang("APART", train_apart)
