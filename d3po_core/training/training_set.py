"""Load a round's training data from its tables and files, and train on it in a fixed order."""

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from d3po_core.config import CampaignConfig
from d3po_core.denoising.ddim import Schedule
from d3po_core.errors import D3POError
from d3po_core.image_ids import is_imported
from d3po_core.models.policy import Policy
from d3po_core.seeds import derive_seed
from d3po_core.sizes import Size
from d3po_core.store.integrity import require_files
from d3po_core.store.tables import partition, read_rows
from d3po_core.training.final_images import RoundStart
from d3po_core.training.lesson import TrainingSet
from d3po_core.training.objective import Labels
from d3po_core.training.objectives import make_objective
from d3po_core.training.packing import PairedGroup
from d3po_core.training.trainer import Update, measure_learned, train_updates
from d3po_core.training.update import Seen

ShardTensors = dict[str, torch.Tensor]

SAME = 1e-9  # rewards that differ by less are equal up to rounding


def load_training_sets(
    campaign: Path, round_number: int, load_shard: Callable[[str], ShardTensors] | None = None,
    labels: Labels = "pairs",
) -> list[TrainingSet]:  # fmt: skip
    """Return a round's trajectories and labels, a set for each size of images, without the images that have none.

    There is at least one set, empty if no image has a label.

    Args:
        campaign: the campaign's folder.
        round_number: the round.
        load_shard: returns ``latents`` and ``log_probs`` of a ``trajectory_path``; reads the file by default.
        labels: what the objective learns from.
    """
    label_of = image_numbers(campaign, round_number, labels)
    used = labelled_samples(campaign, round_number, labels)
    pairs = read_rows(partition(campaign, "preferences", round_number) / "part.parquet")
    if load_shard is None:  # one flipped bit would change the checkpoint
        require_files(campaign, {sample["trajectory_path"] for sample in used})
        load_shard = partial(_read_shard, campaign)
    by_size: dict[Size | None, list[dict[str, Any]]] = {}
    for sample in used:
        size = (sample["height"], sample["width"]) if sample.get("height") else None
        by_size.setdefault(size, []).append(sample)
    return [_set_of(samples, pairs, label_of, load_shard, size) for size, samples in (by_size or {None: used}).items()]


def _set_of(
    used: list[dict[str, Any]], pairs: list[dict[str, Any]], label_of: dict[str, float],
    load_shard: Callable[[str], ShardTensors], size: Size | None,
) -> TrainingSet:  # fmt: skip
    index = {sample["sample_id"]: i for i, sample in enumerate(used)}
    pairs = [pair for pair in pairs if pair["winner_id"] in index and pair["loser_id"] in index]
    pairs_of: dict[str, list[tuple[int, int, float]]] = defaultdict(list)
    images_of: dict[str, list[int]] = defaultdict(list)
    for pair in pairs:
        pairs_of[pair["group_id"]].append((index[pair["winner_id"]], index[pair["loser_id"]], pair["weight"]))
    for i, sample in enumerate(used):
        images_of[sample["group_id"]].append(i)
    shards = {path: load_shard(path) for path in dict.fromkeys(sample["trajectory_path"] for sample in used)}
    rows = [(shards[sample["trajectory_path"]], sample["trajectory_row"]) for sample in used]
    latents_NTCHW, log_probs_NT = _stacked(rows)
    return TrainingSet(
        prompts=[sample["prompt"] for sample in used],
        latents_NTCHW=latents_NTCHW,
        log_probs_NT=log_probs_NT,
        groups=[
            PairedGroup(
                tuple(images),
                tuple(pairs_of[group]),
                tuple(label_of[used[i]["sample_id"]] for i in images) if label_of else (),
            )
            for group, images in images_of.items()
        ],
        noise_seeds=[sample["seed"] for sample in used],
        size=size,
        imported=frozenset(i for i, sample in enumerate(used) if is_imported(sample["trajectory_path"])),
    )


def _stacked(rows: list[tuple[ShardTensors, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return latents and log_probs of all rows; an image without a trajectory stands still at x_0, with zeros."""
    if not rows:
        return torch.empty(0), torch.empty(0)
    latents = [shard["latents"][row] for shard, row in rows]
    longest = max(map(len, latents))
    latents = [latent if len(latent) == longest else latent.expand(longest, *latent.shape[1:]) for latent in latents]
    log_probs = [shard["log_probs"][row] if "log_probs" in shard else torch.zeros(longest - 1) for shard, row in rows]
    return torch.stack(latents), torch.stack(log_probs)


def labelled_samples(campaign: Path, round_number: int, labels: Labels) -> list[dict[str, Any]]:
    """Return the rows of ``samples`` of the images that have a label, in the table's order."""
    samples = read_rows(partition(campaign, "samples", round_number) / "part.parquet")
    known = {*image_numbers(campaign, round_number, labels)}
    if labels == "pairs":
        pairs = read_rows(partition(campaign, "preferences", round_number) / "part.parquet")
        known = {pair[side] for pair in pairs for side in ("winner_id", "loser_id")}
    return [sample for sample in samples if sample["sample_id"] in known]


def image_numbers(campaign: Path, round_number: int, labels: Labels) -> dict[str, float]:
    """Return the label of each labelled image by its id: its advantage in its group, or 1 for good and -1 for bad.

    An advantage is (reward - mean) / (standard deviation + 1e-6) over the group. Groups of equal rewards have none.
    With ``pairs``, no image has a label of its own.

    Raises:
        D3POError: the round was derived by an earlier version, which kept no labels of images.
    """
    if labels == "pairs":
        return {}
    path = partition(campaign, "image_labels", round_number) / "part.parquet"
    if not path.exists():
        raise D3POError(
            f"round {round_number} of campaign {campaign.name!r} has no table image_labels, since an earlier version "
            "derived it; train it with an objective that learns from pairs"
        )
    rows = read_rows(path)
    if labels == "good_bad":
        return {row["sample_id"]: 1.0 if row["good"] else -1.0 for row in rows if row["good"] is not None}
    groups: dict[str, dict[str, float]] = defaultdict(dict)
    for row in rows:
        if row["reward"] is not None:
            groups[row["group_id"]][row["sample_id"]] = row["reward"]
    found: dict[str, float] = {}
    for rewards in groups.values():
        mean, spread = statistics.fmean(rewards.values()), statistics.pstdev(rewards.values())
        if spread > SAME:
            found |= {image: (reward - mean) / (spread + 1e-6) for image, reward in rewards.items()}
    return found


def num_groups(config: CampaignConfig, round_number: int) -> int:
    """Return the number of groups that the round's objective learns from."""
    labels = make_objective(config.train).takes()
    name = "preferences" if labels == "pairs" else "image_labels"
    rows = read_rows(partition(config.folder, name, round_number) / "part.parquet")
    label_of = image_numbers(config.folder, round_number, labels)
    return len({row["group_id"] for row in rows if labels == "pairs" or row["sample_id"] in label_of})


def _read_shard(campaign: Path, path: str) -> ShardTensors:
    return load_file(campaign / path)


def training_seed(config: CampaignConfig, round_number: int) -> int:
    """Return the seed that fixes the order of a round's groups and steps."""
    return derive_seed(config.seed, round_number, "train")


def train_round(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    data: list[TrainingSet],
    config: CampaignConfig,
    round_number: int,
    first_update: int = 0,
    start: RoundStart | None = None,
) -> Iterator[Update]:
    """Run a round's optimizer updates from the current policy and optimizer; see ``train_updates``."""
    (schedule, first), *more = _with_steps(policy, data, config)
    seed = training_seed(config, round_number)
    return train_updates(
        policy, optimizer, schedule, first, config.train, config.sample.guidance_scale, seed, first_update, start, more
    )


def measure_round(policy: Policy, data: list[TrainingSet], config: CampaignConfig, round_number: int) -> Seen | None:
    """Return the current policy's metrics on the round's pairs; see ``measure_learned``."""
    (schedule, first), *more = _with_steps(policy, data, config)
    seed = derive_seed(training_seed(config, round_number), "measured")
    return measure_learned(policy, schedule, first, config.train, config.sample.guidance_scale, seed, more)


def _with_steps(policy: Policy, data: list[TrainingSet], config: CampaignConfig) -> list[tuple[Schedule, TrainingSet]]:
    """Return each set with the steps of its size, as it was sampled."""
    sample = config.sample
    sizes = [part.size if part.size in sample.image_sizes else None for part in data]
    return [(policy.schedule(sample.num_steps, sample.eta, size), part) for size, part in zip(sizes, data, strict=True)]
