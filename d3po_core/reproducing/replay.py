"""Train a round again from the files on disk and compare the checkpoint."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from d3po_core.errors import D3POError, NonFiniteLossError
from d3po_core.image_ids import is_imported
from d3po_core.models.checkpoint import OPTIMIZER_FILE, RECORD_FILE, computed_on, load_round
from d3po_core.models.policy import Policy
from d3po_core.models.weights import weights_file, weights_sha256
from d3po_core.reproducing.regenerate import checkpoint_round, largest_difference, made_on, redraw, training_batches
from d3po_core.store.campaign import round_config
from d3po_core.store.integrity import require_files
from d3po_core.store.stages import checkpoint_path
from d3po_core.store.tables import partition, read_rows
from d3po_core.training.objectives import make_objective
from d3po_core.training.optimizer import make_optimizer
from d3po_core.training.trainer import Update
from d3po_core.training.training_set import ShardTensors, load_training_sets, train_round


@dataclass(frozen=True)
class Replay:
    """The result of training a round again.

    Attributes:
        round: the round.
        stored_sha256: digest of the trained weights' file, from the row in ``rounds``.
        sha256: digest of the file that the replay made.
        num_updates: number of optimizer updates made.
        failure: what stopped training before its last update; None if nothing did.
        largest_difference: largest difference of a weight from the stored one; None if that file is gone.
        largest_move: the furthest that the replay moved any weight.
        sampled_again: trajectory files that were gone and were sampled anew.
        images_compared: number of resampled images whose stored file still exists.
        images_identical: how many of these are the same in every pixel.
        made_on: the round's ``computed_on``; None if it was not recorded.
        computed_on: device, threads, torch and processes of this run.
    """

    round: int
    stored_sha256: str
    sha256: str
    num_updates: int
    failure: str | None
    largest_difference: float | None
    largest_move: float
    sampled_again: tuple[str, ...]
    images_compared: int
    images_identical: int
    made_on: dict[str, Any] | None
    computed_on: dict[str, Any]

    @property
    def identical(self) -> bool:
        """Return whether the replay gave the same weights, byte for byte."""
        return self.sha256 == self.stored_sha256


def replay_round(
    campaign: Path, round_number: int, policy: Policy, on_update: Callable[[Update], None] | None = None
) -> Replay:
    """Train a finished round again from its checkpoint, optimizer state, preferences and trajectories.

    Missing trajectories are sampled anew first. Nothing is written to the campaign.

    Args:
        campaign: the campaign's folder.
        round_number: a finished round, 1 or later.
        policy: the model of the round's configuration; its weights are replaced.
        on_update: called after every optimizer update.

    Raises:
        D3POError: files that the round needs are missing; the message lists them all.
    """
    config = round_config(campaign, round_number)
    check_replayable(campaign, round_number)
    resampled = _Resampled(campaign, round_number, policy)
    data = load_training_sets(campaign, round_number, resampled.load_shard, make_objective(config.train).takes())
    optimizer = make_optimizer(policy, config.train)
    carried = optimizer if config.train.carry_optimizer else None
    load_round(campaign, _start(campaign, round_number), policy, carried)
    before = {name: parameter.detach().cpu().clone() for name, parameter in policy.weights.parameters()}
    num_updates, failure = 0, None
    try:
        for update in train_round(policy, optimizer, data, config, round_number):
            num_updates += 1
            if on_update:
                on_update(update)
    except NonFiniteLossError as error:
        failure = str(error)
    after = {name: parameter.detach().cpu().clone() for name, parameter in policy.weights.parameters()}
    stored = campaign / str(checkpoint_path(round_number))
    with tempfile.TemporaryDirectory() as folder:
        file = policy.weights.save(Path(folder))
        digest = weights_sha256(Path(folder))
        difference = _largest(load_file(file), weights_file(stored))
    return Replay(
        round=round_number,
        stored_sha256=read_rows(partition(campaign, "rounds", round_number) / "part.parquet")[0]["lora_sha256"],
        sha256=digest,
        num_updates=num_updates,
        failure=failure,
        largest_difference=difference,
        largest_move=max(float((after[name] - before[name]).abs().max()) for name in before),
        sampled_again=tuple(resampled.paths),
        images_compared=resampled.compared,
        images_identical=resampled.identical,
        made_on=made_on(campaign, round_number),
        computed_on=computed_on(policy),
    )


def check_replayable(campaign: Path, round_number: int) -> None:
    """Check that all files that a round's training starts from are on disk.

    Raises:
        D3POError: some are missing; the message lists them all.
    """
    needed = [partition(campaign, table, round_number) / "part.parquet" for table in ("samples", "preferences")]
    before = checkpoint_path(_start(campaign, round_number)) if needed[0].exists() else None
    if before is not None:
        carried = [OPTIMIZER_FILE] if round_config(campaign, round_number).train.carry_optimizer else []
        needed += [weights_file(campaign / before), *(campaign / before / name for name in (RECORD_FILE, *carried))]
    missing = [str(path.relative_to(campaign)) for path in needed if not path.exists()]
    if missing:
        raise D3POError(
            f"round {round_number} of campaign {campaign.name!r} cannot be replayed: {', '.join(missing)} missing; "
            f"restore from a copy of {campaign}"
        )


def _start(campaign: Path, round_number: int) -> int:
    """Return the round whose checkpoint started the training, and drew the images that were sampled."""
    image = read_rows(partition(campaign, "samples", round_number) / "part.parquet")[0]
    if not is_imported(image["trajectory_path"]):
        return checkpoint_round(image["checkpoint"])
    return checkpoint_round(read_rows(partition(campaign, "rounds", round_number) / "part.parquet")[0]["checkpoint_in"])


class _Resampled:
    """Read a round's trajectory files, and sample anew those that are gone."""

    def __init__(self, campaign: Path, round_number: int, policy: Policy) -> None:
        self.campaign, self.round_number, self.policy = campaign, round_number, policy
        self.paths: list[str] = []
        self.compared = self.identical = 0

    def load_shard(self, path: str) -> ShardTensors:
        if (self.campaign / path).exists() or is_imported(path):
            require_files(self.campaign, [path])
            return load_file(self.campaign / path)
        batch = training_batches(self.campaign, self.round_number)[path]
        trajectories, images = redraw(self.campaign, batch, self.policy)
        differences = [
            largest_difference(image, self.campaign / stored)
            for image, stored in zip(images, batch.image_paths, strict=True)
        ]
        self.paths.append(path)
        self.compared += sum(difference is not None for difference in differences)
        self.identical += sum(difference == 0 for difference in differences)
        return {"latents": trajectories.latents_BTCHW, "log_probs": trajectories.log_probs_BT}


def _largest(now: dict[str, torch.Tensor], stored: Path) -> float | None:
    if not stored.exists():
        return None
    then = load_file(stored)
    return max(float((now[name] - then[name]).abs().max()) for name in now)
