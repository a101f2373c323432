"""Train: the round's preferences into the next checkpoint."""

import json
import shutil
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from prefect import task

from d3po_core.campaign import checkpoint_path, finish_stage, start_of
from d3po_core.checkpoint import computed_on, load_checkpoint, load_round, save_checkpoint
from d3po_core.config import CampaignConfig
from d3po_core.errors import NonFiniteLossError
from d3po_core.policy import Policy
from d3po_core.records import TrainRecord
from d3po_core.tables import table_from_rows, write_table
from d3po_core.trainer import TrainingSet, make_optimizer, plan_updates
from d3po_core.training_set import load_training_set, train_round, training_seed
from tasks import tracking
from tasks.stage import STAGE_OPTIONS, gpu_turn, policy_at, progress

AVERAGED = ("loss", "margin", "pair_accuracy", "kl", "clip_fraction")


@task(name="train", **STAGE_OPTIONS)
def train_policy(config: CampaignConfig, round_number: int) -> TrainRecord:
    """Train the policy on the round's preferences and write the round's checkpoint."""
    record = finish_stage(config.folder, round_number, "train", TrainRecord, lambda: _train(config, round_number))
    tracking.deliver(config)
    return record


def _train(config: CampaignConfig, round_number: int) -> TrainRecord:
    relative = checkpoint_path(round_number)
    assert relative is not None, "round 0 is the base model and is not trained"
    checkpoint = config.folder / relative
    policy = policy_at(config, start_of(config.folder, round_number))
    optimizer = make_optimizer(policy, config.train)
    data = load_training_set(config.folder, round_number)
    updates = _restore(config, round_number, policy, optimizer)
    failure = None
    try:
        _run_updates(config, round_number, policy, optimizer, data, updates)
    except NonFiniteLossError as error:
        if config.guard.policy != "reject":
            raise
        failure = str(error)  # the guard rejects what was reached, and the next round starts from the champion
    _write_updates(config, round_number, updates)
    save_checkpoint(
        checkpoint, policy, optimizer, {"round": round_number, "config_sha256": config.sha256(), **computed_on(policy)}
    )
    for leftover in _progress_folders(checkpoint):
        shutil.rmtree(leftover)
    means = {key: _mean(updates, key) for key in AVERAGED}
    digest = json.loads((checkpoint / "checkpoint.json").read_text())["lora_sha256"]
    return TrainRecord(checkpoint=relative, lora_sha256=digest, num_updates=len(updates), failure=failure, **means)


def _run_updates(
    config: CampaignConfig, round_number: int, policy: Policy, optimizer: torch.optim.Optimizer, data: TrainingSet,
    updates: list[dict[str, Any]],
) -> None:  # fmt: skip
    """Make the updates that are still to be made, adding each to ``updates``, and save now and then."""
    checkpoint = config.folder / str(checkpoint_path(round_number))
    total = len(plan_updates(len(data.groups), config.train, training_seed(config, round_number)))
    saved_at = time.monotonic()
    with gpu_turn(policy.device.type), progress(config, round_number, "train", total, "update", len(updates)) as bar:
        for update in train_round(policy, optimizer, data, config, round_number, first_update=len(updates)):
            updates.append({**asdict(update), "finished_at": datetime.now(UTC).isoformat()})
            bar.update()
            if time.monotonic() - saved_at >= config.train.save_every_seconds and len(updates) < total:
                _save_progress(checkpoint, policy, optimizer, updates)
                saved_at = time.monotonic()


def _mean(updates: list[dict[str, Any]], key: str) -> float | None:
    pairs = sum(update["num_pairs"] for update in updates)
    return sum(update[key] * update["num_pairs"] for update in updates) / pairs if pairs else None


def _restore(
    config: CampaignConfig, round_number: int, policy: Policy, optimizer: torch.optim.Optimizer
) -> list[dict[str, Any]]:
    """Go on from what an interrupted run of this round saved, or from the checkpoint of the round before."""
    checkpoint = config.folder / str(checkpoint_path(round_number))
    for folder in reversed(_progress_folders(checkpoint)):
        updates: list[dict[str, Any]] = load_checkpoint(folder, policy, optimizer)["updates"]
        return updates
    start = start_of(config.folder, round_number)
    load_round(config.folder, start, policy, optimizer if config.train.carry_optimizer else None)
    return []


def _progress_folders(checkpoint: Path) -> list[Path]:
    return sorted(checkpoint.parent.glob(f"{checkpoint.name}-update=*"))


def _save_progress(
    checkpoint: Path, policy: Policy, optimizer: torch.optim.Optimizer, updates: list[dict[str, Any]]
) -> None:
    older = _progress_folders(checkpoint)
    folder = checkpoint.with_name(f"{checkpoint.name}-update={len(updates):06d}")
    save_checkpoint(folder, policy, optimizer, {"updates": updates})
    for path in older:
        shutil.rmtree(path)


def _write_updates(config: CampaignConfig, round_number: int, updates: list[dict[str, Any]]) -> None:
    rows = [{k: v for k, v in update.items() if k != "per_step"} for update in updates]
    rows = [{**row, "finished_at": datetime.fromisoformat(row["finished_at"])} for row in rows]
    write_table(config.folder, "updates", round_number, table_from_rows("updates", rows))
    per_step = [row for update in updates for row in update["per_step"]]
    write_table(config.folder, "update_steps", round_number, table_from_rows("update_steps", per_step))
