"""A round trained again from what is on disk, to see whether the same checkpoint comes out."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from d3po_core.errors import D3POError, NonFiniteLossError
from d3po_core.models.checkpoint import OPTIMIZER_FILE, RECORD_FILE, computed_on, load_round
from d3po_core.models.policy import Policy
from d3po_core.models.weights import weights_file, weights_sha256
from d3po_core.reproducing.regenerate import checkpoint_round, largest_difference, made_on, redraw, training_batches
from d3po_core.store.campaign import round_config
from d3po_core.store.integrity import require_files
from d3po_core.store.stages import checkpoint_path
from d3po_core.store.tables import partition, read_rows
from d3po_core.training.optimizer import make_optimizer
from d3po_core.training.trainer import Update
from d3po_core.training.training_set import ShardTensors, load_training_set, train_round


@dataclass(frozen=True)
class Replay:
    """What came out of a round trained again.

    Attributes:
        round: the round.
        stored_sha256: digest of the trained weights' file as the row in ``rounds`` has it.
        sha256: digest of the file that came out now.
        num_updates: optimizer updates made.
        failure: what stopped training before its last update, None when nothing did.
        largest_difference: largest difference of a weight from the stored one; None when its file is gone.
        largest_move: how far the round moved a weight at most, now.
        sampled_again: trajectory files that were gone and were sampled anew.
        images_compared: images of those whose stored file is still there.
        images_identical: how many of these came out the same in every pixel.
        made_on: what the round was computed with (``computed_on``), None when it did not record that.
        computed_on: the same of now.
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
        """Whether the same weights came out, byte for byte."""
        return self.sha256 == self.stored_sha256


def replay_round(
    campaign: Path, round_number: int, policy: Policy, on_update: Callable[[Update], None] | None = None
) -> Replay:
    """Train a finished round again, from the checkpoint, optimizer state, preferences and trajectories on disk.

    Trajectories that are gone are sampled anew first. Nothing in the campaign is written.

    Args:
        campaign: the campaign's folder.
        round_number: a finished round, 1 or later.
        policy: the model of the round's configuration; its weights are replaced.
        on_update: called after every optimizer update.

    Raises:
        D3POError: something that the round needs is missing; the message lists all of it.
    """
    config = round_config(campaign, round_number)
    check_replayable(campaign, round_number)
    resampled = _Resampled(campaign, round_number, policy)
    data = load_training_set(campaign, round_number, resampled.load_shard)
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
    """Make sure that everything that a round's training starts from is on disk.

    Raises:
        D3POError: what is missing.
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
    """The round whose checkpoint drew the round's images, and that its training went on from."""
    rows = read_rows(partition(campaign, "samples", round_number) / "part.parquet")
    return checkpoint_round(rows[0]["checkpoint"])


class _Resampled:
    """Reads a round's trajectory files, and samples anew those that are gone."""

    def __init__(self, campaign: Path, round_number: int, policy: Policy) -> None:
        self.campaign, self.round_number, self.policy = campaign, round_number, policy
        self.paths: list[str] = []
        self.compared = self.identical = 0

    def load_shard(self, path: str) -> ShardTensors:
        if (self.campaign / path).exists():
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
