"""Load a round's training data from its tables and files, and train on it in a fixed order."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file

from d3po_core.config import CampaignConfig
from d3po_core.models.policy import Policy
from d3po_core.seeds import derive_seed
from d3po_core.store.integrity import require_files
from d3po_core.store.tables import partition, read_rows
from d3po_core.training.lesson import TrainingSet
from d3po_core.training.packing import PairedGroup
from d3po_core.training.trainer import Update, measure_learned, train_updates
from d3po_core.training.update import Seen

ShardTensors = dict[str, torch.Tensor]


def load_training_set(
    campaign: Path, round_number: int, load_shard: Callable[[str], ShardTensors] | None = None
) -> TrainingSet:
    """Return a round's trajectories and pairs, without the images that have no pair.

    Args:
        campaign: the campaign's folder.
        round_number: the round.
        load_shard: returns ``latents`` and ``log_probs`` of a ``trajectory_path``; reads the file by default.
    """
    samples = read_rows(partition(campaign, "samples", round_number) / "part.parquet")
    pairs = read_rows(partition(campaign, "preferences", round_number) / "part.parquet")
    paired = {pair[side] for pair in pairs for side in ("winner_id", "loser_id")}
    used = [sample for sample in samples if sample["sample_id"] in paired]
    index = {sample["sample_id"]: i for i, sample in enumerate(used)}
    pairs_of: dict[str, list[tuple[int, int, float]]] = defaultdict(list)
    images_of: dict[str, list[int]] = defaultdict(list)
    for pair in pairs:
        pairs_of[pair["group_id"]].append((index[pair["winner_id"]], index[pair["loser_id"]], pair["weight"]))
    for i, sample in enumerate(used):
        images_of[sample["group_id"]].append(i)
    if load_shard is None:  # one flipped bit would change the checkpoint
        require_files(campaign, {sample["trajectory_path"] for sample in used})
        load_shard = partial(_read_shard, campaign)
    shards = {path: load_shard(path) for path in dict.fromkeys(sample["trajectory_path"] for sample in used)}
    rows = [(shards[sample["trajectory_path"]], sample["trajectory_row"]) for sample in used]
    empty = torch.empty(0)
    return TrainingSet(
        prompts=[sample["prompt"] for sample in used],
        latents_NTCHW=torch.stack([shard["latents"][row] for shard, row in rows]) if rows else empty,
        log_probs_NT=torch.stack([shard["log_probs"][row] for shard, row in rows]) if rows else empty,
        groups=[PairedGroup(tuple(images_of[group]), tuple(pairs_of[group])) for group in images_of],
        noise_seeds=[sample["seed"] for sample in used],
    )


def _read_shard(campaign: Path, path: str) -> ShardTensors:
    return load_file(campaign / path)


def training_seed(config: CampaignConfig, round_number: int) -> int:
    """Return the seed that fixes the order of a round's groups and steps."""
    return derive_seed(config.seed, round_number, "train")


def train_round(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    data: TrainingSet,
    config: CampaignConfig,
    round_number: int,
    first_update: int = 0,
) -> Iterator[Update]:
    """Run a round's optimizer updates from the current policy and optimizer; see ``train_updates``."""
    schedule = policy.schedule(config.sample.num_steps, config.sample.eta)
    seed = training_seed(config, round_number)
    return train_updates(
        policy, optimizer, schedule, data, config.train, config.sample.guidance_scale, seed, first_update
    )


def measure_round(policy: Policy, data: TrainingSet, config: CampaignConfig, round_number: int) -> Seen | None:
    """Return the current policy's metrics on the round's pairs; see ``measure_learned``."""
    schedule = policy.schedule(config.sample.num_steps, config.sample.eta)
    seed = derive_seed(training_seed(config, round_number), "measured")
    return measure_learned(policy, schedule, data, config.train, config.sample.guidance_scale, seed)
