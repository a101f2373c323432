"""Sample a round's images shard by shard."""

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors.torch import save

from d3po_core.config import CampaignConfig
from d3po_core.image_ids import group_id, sample_id
from d3po_core.models.loaded import policy_at
from d3po_core.processes.job import Files, Made, QueueJob
from d3po_core.processes.parcel import keep_files
from d3po_core.sampling.drawing import draw_and_write
from d3po_core.sampling.prompts import draw_prompts, load_prompts
from d3po_core.sampling.rollout import FirstOutputs, Trajectories, size_of
from d3po_core.seeds import ImageSeed, member_seed
from d3po_core.sizes import Size
from d3po_core.store.images import pngs_bytes
from d3po_core.store.stages import checkpoint_path, policy_files, start_of
from d3po_core.store.tables import SCHEMAS, table_from_rows


class Member(NamedTuple):
    """One image of a group: its ids, its place in the group, and its seed."""

    sample_id: str
    group_id: str
    place: int
    seed: ImageSeed


@dataclass(frozen=True)
class Shard:
    """Whole groups of a round, of one size, that are sampled as one batch.

    Attributes:
        index: its place in the round.
        members: its images.
        rows_path: their rows of ``samples``; written last, so a resumed run skips finished shards.
    """

    index: int
    members: list[Member]
    rows_path: Path

    @property
    def round_number(self) -> int:
        """Return its round."""
        return int(self.rows_path.parent.name.removeprefix("round="))


def round_shards(config: CampaignConfig, round_number: int) -> list[Shard]:
    """Return all shards of a round, in order."""
    by_size: dict[Size | None, list[list[Member]]] = {}
    for group in round_members(config, round_number):
        by_size.setdefault(group[0].seed.size, []).append(group)
    per_shard = max(1, config.sample.batch_size // config.sample.group_size)
    staging = config.folder / "staging" / f"round={round_number}"
    batches = [groups[i : i + per_shard] for groups in by_size.values() for i in range(0, len(groups), per_shard)]
    return [
        Shard(index, list(chain(*batch)), staging / f"shard-{index:04d}.parquet") for index, batch in enumerate(batches)
    ]


def round_members(config: CampaignConfig, round_number: int) -> list[list[Member]]:
    """Return the members of the round's groups.

    Every seed is a hash of (campaign seed, round, prompt, earlier uses of the prompt in this round, member); so is a
    group's size, without the member.
    """
    prompts = load_prompts(config.sample.prompts, config.sample.prompt_column, "sample.prompts")
    drawn = draw_prompts(prompts, config.sample.sampled_groups, config.seed, round_number)
    groups = []
    for index, (prompt, occurrence) in enumerate(drawn):
        group = group_id(round_number, index)
        shared, sizes = config.sample.share_initial_latent, config.sample.image_sizes
        groups.append(
            [
                Member(
                    sample_id(group, place), group, place,
                    member_seed(config.seed, round_number, prompt, occurrence, place, shared, sizes),
                )
                for place in range(config.sample.group_size)
            ]
        )  # fmt: skip
    return groups


def _missing(config: CampaignConfig, round_number: int) -> list[int]:
    return [shard.index for shard in round_shards(config, round_number) if not shard.rows_path.exists()]


def _make(config: CampaignConfig, round_number: int, items: Iterable[int | None]) -> Iterator[Made]:
    """Sample shards as they come."""
    policy = policy_at(config, start_of(config.folder, round_number))
    shards = round_shards(config, round_number)
    seeds = [[member.seed for member in shard.members] for shard in shards]
    first = FirstOutputs(policy, config.sample, list(chain(*seeds)), getattr(torch, config.sample.latent_dtype))
    # Use the family's schedules on the CPU: reading the policy's from the GPU would wait for the next shard.
    steps = (config.sample.num_steps, config.sample.eta)
    timesteps = {
        size: policy.family.schedule(*steps, policy.latent_shape_at(size)).timesteps_T
        for size in config.sample.image_sizes
    }

    def write(index: int, trajectories: Trajectories, images: np.ndarray, _: None) -> Made:
        timesteps_T = timesteps[size_of(seeds[index])]
        files = _files(config, round_number, shards[index], trajectories, images, timesteps_T)
        return Made(index, len(images), files)

    batches = (None if item is None else (item, seeds[item]) for item in items)
    return draw_and_write(policy, config.sample, batches, first, write, lambda index, drawn: None)


def _files(
    config: CampaignConfig, round_number: int, shard: Shard, trajectories: Trajectories, images: np.ndarray,
    timesteps_T: torch.Tensor,
) -> Files:  # fmt: skip
    """Return a shard's files, its rows last."""
    trajectory_path = f"trajectories/round={round_number}/shard-{shard.index:04d}.safetensors"
    tensors = {"latents": trajectories.latents_BTCHW.contiguous(), "log_probs": trajectories.log_probs_BT}
    files: Files = {trajectory_path: save({**tensors, "timesteps": timesteps_T})}
    image_paths = [f"images/round={round_number}/{member.sample_id}.png" for member in shard.members]
    files |= zip(image_paths, pngs_bytes(images), strict=True)
    rows, checkpoint = [], checkpoint_path(start_of(config.folder, round_number))
    for row, member in enumerate(shard.members):
        rows.append(
            {
                "sample_id": member.sample_id, "group_id": member.group_id, "member": member.place,
                "prompt": member.seed.prompt, "split": "train", "seed": member.seed.noise_seed,
                "image_path": image_paths[row], "trajectory_path": trajectory_path, "trajectory_row": row,
                "checkpoint": checkpoint, "height": images.shape[1], "width": images.shape[2],
            }
        )  # fmt: skip
    sink = io.BytesIO()
    pq.write_table(table_from_rows("samples", rows).cast(SCHEMAS["samples"]), sink)
    return files | {shard.rows_path.relative_to(config.folder).as_posix(): sink.getvalue()}


def _needs(config: CampaignConfig, round_number: int) -> list[str]:
    return policy_files(config.folder, round_number, start_of(config.folder, round_number))


SAMPLE = QueueJob(
    name="d3po_core.sampling.job:SAMPLE",
    items=_missing,
    needs=_needs,
    inputs=("sample.prompts",),
    make=_make,
    keep=keep_files,
    finish=lambda results: None,
)
"""Sample the round's missing shards; the units are images."""
