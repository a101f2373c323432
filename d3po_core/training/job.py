"""Train a round's checkpoint: each rank computes its share of every update, the first one's files are kept."""

import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from d3po_core.config import CampaignConfig
from d3po_core.errors import NonFiniteLossError, RankError
from d3po_core.models.checkpoint import (
    RECORD_FILE,
    computed_on,
    load_checkpoint,
    load_round,
    optimizer_state,
    save_checkpoint,
    whole_folder,
)
from d3po_core.models.loaded import policy_at
from d3po_core.models.policy import Policy
from d3po_core.processes.job import Files, GangJob, Tell
from d3po_core.processes.parcel import keep_files
from d3po_core.processes.ranks import check_agreement
from d3po_core.store.stages import checkpoint_path, policy_files, start_of
from d3po_core.store.tables import table_from_rows, write_table
from d3po_core.training.final_images import RoundStart
from d3po_core.training.lesson import TrainingSet
from d3po_core.training.objectives import make_objective
from d3po_core.training.optimizer import make_optimizer
from d3po_core.training.trainer import Update, plan_updates
from d3po_core.training.training_set import (
    labelled_samples,
    load_training_sets,
    measure_round,
    num_groups,
    train_round,
    training_seed,
)
from d3po_core.training.update import Seen

AVERAGED = (
    "loss", "margin_before", "pair_accuracy_before", "kl_before", "clip_fraction", "gradient_factor", "drowned",
)  # fmt: skip

MEASURED = ("margin", "pair_accuracy", "kl", "winner_error", "loser_error", "neutral_error")

Rows = list[dict[str, Any]]


def count_updates(config: CampaignConfig, round_number: int) -> tuple[int, int]:
    """Return the round's number of updates, and how many an interrupted run has saved."""
    groups = num_groups(config, round_number)
    total = len(plan_updates(groups, config.train, training_seed(config, round_number)))
    saved = [int(path.name.rpartition("=")[2]) for path in _progress_folders(_folder(config, round_number))]
    return total, max(saved, default=0)


def train_checkpoint(
    config: CampaignConfig, round_number: int, tell: Tell, kept: Callable[[list[str]], None] = lambda paths: None
) -> dict[str, Any]:
    """Train on the round's preferences, write checkpoint and tables, and report each update.

    Args:
        config: the campaign's configuration.
        round_number: the round.
        tell: called after each update, by the first rank.
        kept: called by the first rank with the paths of what it has just written.

    Raises:
        NonFiniteLossError: the loss or gradient became non-finite, and ``guard.policy`` is not ``reject``.
        RankError: the ranks reached different weights; all their work is discarded.
    """
    checkpoint = _folder(config, round_number)
    policy = policy_at(config, start_of(config.folder, round_number))
    optimizer = make_optimizer(policy, config.train)
    objective = make_objective(config.train)
    start = RoundStart(policy) if objective.source != "trajectory" else None  # before an interrupted run's progress
    updates = _restore(config, round_number, policy, optimizer)
    data = load_training_sets(config.folder, round_number, labels=objective.takes())
    first, failure = policy.accelerator.is_main_process, None
    try:
        _run_updates(config, round_number, policy, optimizer, data, updates, tell, start, kept)
    except NonFiniteLossError as error:
        if config.guard.policy != "reject":
            raise
        failure = str(error)  # the guard rejects this checkpoint; the next round starts from the champion
    _check_ranks(policy, optimizer, checkpoint)
    learned = measure_round(policy, data, config, round_number)
    if first:
        _write_updates(config, round_number, updates)
        memory = policy.memory_used()
        record = {"round": round_number, "config_sha256": config.sha256(), "memory": memory, **computed_on(policy)}
        save_checkpoint(checkpoint, policy, optimizer, record)
        _drop_progress(checkpoint)
        tables = [f"{table}/round={round_number}" for table in ("updates", "update_steps")]
        kept([*tables, checkpoint.relative_to(config.folder).as_posix()])
        digest = json.loads((checkpoint / RECORD_FILE).read_text())["lora_sha256"]
    means = {key: _mean(updates, key) for key in AVERAGED}
    return {
        "lora_sha256": digest if first else None, "num_updates": len(updates), "failure": failure, **means,
        **_after(learned),
    }  # fmt: skip


def _after(learned: Seen | None) -> dict[str, float]:
    """Return the final measurements under their record names, without the non-finite ones of a failed round."""
    values = {f"{key}_after": getattr(learned, key) for key in MEASURED} if learned else {}
    return {name: value for name, value in values.items() if value is not None and math.isfinite(value)}


def _run_updates(
    config: CampaignConfig, round_number: int, policy: Policy, optimizer: torch.optim.Optimizer,
    data: list[TrainingSet], updates: Rows, tell: Tell, start: RoundStart | None, kept: Callable[[list[str]], None],
) -> None:  # fmt: skip
    """Run the remaining updates, append each to ``updates``, and save progress at intervals."""
    total = len(plan_updates(sum(len(part.groups) for part in data), config.train, training_seed(config, round_number)))
    saved_at = time.monotonic()
    for update in train_round(policy, optimizer, data, config, round_number, first_update=len(updates), start=start):
        updates.append({**asdict(update), "finished_at": datetime.now(UTC).isoformat()})
        if not policy.accelerator.is_main_process:
            continue
        tell(1)
        if time.monotonic() - saved_at >= config.train.save_every_seconds and len(updates) < total:
            saved = _save_progress(_folder(config, round_number), policy, optimizer, updates)
            kept([saved.relative_to(config.folder).as_posix()])
            saved_at = time.monotonic()


def _check_ranks(policy: Policy, optimizer: torch.optim.Optimizer, checkpoint: Path) -> None:
    """Check that all ranks made the same steps; waits until every rank has read an earlier run's progress."""
    state = {**dict(policy.weights.parameters()), **optimizer_state(policy, optimizer)}
    try:
        check_agreement(policy.accelerator, state)
    except RankError:
        if policy.accelerator.is_main_process:
            _drop_progress(checkpoint)  # may be wrong too, so the next attempt restarts the round
        policy.accelerator.wait_for_everyone()  # the first rank to raise ends all others
        raise


def _mean(updates: Rows, key: str) -> float | None:
    known = [update for update in updates if update[key] is not None]
    units = sum(update["num_units"] for update in known)
    return sum(update[key] * update["num_units"] for update in known) / units if units else None


def _restore(config: CampaignConfig, round_number: int, policy: Policy, optimizer: torch.optim.Optimizer) -> Rows:
    """Resume from an interrupted run's progress, or from the checkpoint that the round starts at."""
    for folder in reversed(_progress_folders(_folder(config, round_number))):
        if not _is_of_this_version(folder):
            break  # its rows lack columns, so the round's training restarts
        updates: Rows = load_checkpoint(folder, policy, optimizer)["updates"]
        return updates
    start = start_of(config.folder, round_number)
    load_round(config.folder, start, policy, optimizer if config.train.carry_optimizer else None)
    return []


def _is_of_this_version(progress: Path) -> bool:
    names = {field.name for field in fields(Update)}
    return all(names <= row.keys() for row in json.loads((progress / RECORD_FILE).read_text())["updates"])


def _folder(config: CampaignConfig, round_number: int) -> Path:
    relative = checkpoint_path(round_number)
    assert relative is not None, "round 0 is the base model and is not trained"
    return config.folder / relative


def _progress_folders(checkpoint: Path) -> list[Path]:
    return sorted(checkpoint.parent.glob(f"{checkpoint.name}-update=*"))


def _drop_progress(checkpoint: Path) -> None:
    for leftover in _progress_folders(checkpoint):
        shutil.rmtree(leftover)


def _save_progress(checkpoint: Path, policy: Policy, optimizer: torch.optim.Optimizer, updates: Rows) -> Path:
    older = _progress_folders(checkpoint)
    folder = checkpoint.with_name(f"{checkpoint.name}-update={len(updates):06d}")
    save_checkpoint(folder, policy, optimizer, {"updates": updates})
    for path in older:
        shutil.rmtree(path)
    return folder


def _write_updates(config: CampaignConfig, round_number: int, updates: Rows) -> None:
    rows = [{k: v for k, v in update.items() if k != "per_step"} for update in updates]
    rows = [{**row, "finished_at": datetime.fromisoformat(row["finished_at"])} for row in rows]
    write_table(config.folder, "updates", round_number, table_from_rows("updates", rows))
    per_step = [row for update in updates for row in update["per_step"]]
    write_table(config.folder, "update_steps", round_number, table_from_rows("update_steps", per_step))


def _needs(config: CampaignConfig, round_number: int) -> list[str]:
    checkpoint = _folder(config, round_number)
    labels = make_objective(config.train).takes()
    used = labelled_samples(config.folder, round_number, labels)
    trajectories = sorted({sample["trajectory_path"] for sample in used})
    names = ("samples", "preferences") if labels == "pairs" else ("samples", "preferences", "image_labels")
    tables = [f"{table}/round={round_number}" for table in names]
    progress = [path.relative_to(config.folder).as_posix() for path in _progress_folders(checkpoint)[-1:]]
    start = start_of(config.folder, round_number)
    return [*policy_files(config.folder, round_number, start), *tables, *trajectories, *progress]


def _keep(config: CampaignConfig, round_number: int, files: Files) -> None:
    """Write tables, then a checkpoint or progress as a whole folder; older progress is then of no use."""
    checkpoint = _folder(config, round_number)
    folders: dict[Path, Files] = {}
    for path, content in files.items():
        top, name = config.folder / Path(*Path(path).parts[:2]), Path(*Path(path).parts[2:]).as_posix()
        if top.parent == checkpoint.parent:
            folders.setdefault(top, {})[name] = content
        else:
            keep_files(config, round_number, {path: content})
    for folder, contents in folders.items():
        older = _progress_folders(checkpoint)
        with whole_folder(folder) as temporary:
            for name, content in contents.items():
                (temporary / name).parent.mkdir(parents=True, exist_ok=True)
                (temporary / name).write_bytes(content)
        for old in older:
            if old != folder:
                shutil.rmtree(old)


TRAIN = GangJob(name="d3po_core.training.job:TRAIN", needs=_needs, run=train_checkpoint, keep=_keep)
"""Train the round's checkpoint; the units are updates."""
