"""Sample a round's images shard by shard; ranks take shards in turn."""

from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file

from d3po_core.config import CampaignConfig
from d3po_core.image_ids import group_id, sample_id
from d3po_core.models.loaded import policy_at
from d3po_core.models.policy import Policy
from d3po_core.processes.job import Tell
from d3po_core.processes.ranks import own_share
from d3po_core.sampling.drawing import draw_and_write
from d3po_core.sampling.prompts import draw_prompts, load_prompts
from d3po_core.sampling.rollout import Trajectories
from d3po_core.seeds import ImageSeed, member_seed
from d3po_core.store.files import atomic_path
from d3po_core.store.images import save_pngs
from d3po_core.store.stages import checkpoint_path, start_of
from d3po_core.store.tables import SCHEMAS, table_from_rows


class Member(NamedTuple):
    """One image of a group: its ids, its place in the group, and its seed."""

    sample_id: str
    group_id: str
    place: int
    seed: ImageSeed


@dataclass(frozen=True)
class Shard:
    """Whole groups of a round that are sampled as one batch.

    Attributes:
        index: its place in the round.
        members: its images.
        rows_path: their rows of ``samples``; written last, so a resumed run skips finished shards.
    """

    index: int
    members: list[Member]
    rows_path: Path


def round_shards(config: CampaignConfig, round_number: int) -> list[Shard]:
    """Return all shards of a round, in order."""
    groups = round_members(config, round_number)
    per_shard = max(1, config.sample.batch_size // config.sample.group_size)
    staging = config.folder / "staging" / f"round={round_number}"
    return [
        Shard(index, list(chain(*groups[first : first + per_shard])), staging / f"shard-{index:04d}.parquet")
        for index, first in enumerate(range(0, len(groups), per_shard))
    ]


def round_members(config: CampaignConfig, round_number: int) -> list[list[Member]]:
    """Return the members of the round's groups.

    Every seed is a hash of (campaign seed, round, prompt, earlier uses of the prompt in this round, member).
    """
    prompts = load_prompts(config.sample.prompts, config.sample.prompt_column, "sample.prompts")
    drawn = draw_prompts(prompts, config.sample.groups_per_round, config.seed, round_number)
    groups = []
    for index, (prompt, occurrence) in enumerate(drawn):
        group = group_id(round_number, index)
        shared = config.sample.share_initial_latent
        groups.append(
            [
                Member(
                    sample_id(group, place), group, place,
                    member_seed(config.seed, round_number, prompt, occurrence, place, shared),
                )
                for place in range(config.sample.group_size)
            ]
        )  # fmt: skip
    return groups


def sample_shards(config: CampaignConfig, round_number: int, tell: Tell) -> None:
    """Sample and write the missing shards, each on one rank, and report the number of images."""
    policy = policy_at(config, start_of(config.folder, round_number))
    own = round_shards(config, round_number)[own_share(policy.accelerator)]
    shards = [shard for shard in own if not shard.rows_path.exists()]

    def write(index: int, trajectories: Trajectories, images: np.ndarray) -> int:
        return _write_shard(config, round_number, policy, shards[index], trajectories, images)

    batches = [[member.seed for member in shard.members] for shard in shards]
    for count in draw_and_write(policy, config.sample, batches, getattr(torch, config.sample.latent_dtype), write):
        tell(count)


def _write_shard(
    config: CampaignConfig, round_number: int, policy: Policy, shard: Shard, trajectories: Trajectories,
    images: np.ndarray,
) -> int:  # fmt: skip
    # Use the family's schedule on the CPU: reading the policy's from the GPU would wait for the next shard.
    schedule = policy.family.schedule(config.sample.num_steps, config.sample.eta)
    trajectory_path = f"trajectories/round={round_number}/shard-{shard.index:04d}.safetensors"
    with atomic_path(config.folder / trajectory_path) as temporary:
        save_file(
            {
                "latents": trajectories.latents_BTCHW.contiguous(),
                "log_probs": trajectories.log_probs_BT,
                "timesteps": schedule.timesteps_T,
            },
            temporary,
        )
    image_paths = [f"images/round={round_number}/{member.sample_id}.png" for member in shard.members]
    save_pngs(images, [config.folder / path for path in image_paths])
    rows, checkpoint = [], checkpoint_path(start_of(config.folder, round_number))
    for row, member in enumerate(shard.members):
        rows.append(
            {
                "sample_id": member.sample_id, "group_id": member.group_id, "member": member.place,
                "prompt": member.seed.prompt, "split": "train", "seed": member.seed.noise_seed,
                "image_path": image_paths[row], "trajectory_path": trajectory_path, "trajectory_row": row,
                "checkpoint": checkpoint,
            }
        )  # fmt: skip
    with atomic_path(shard.rows_path) as temporary:
        pq.write_table(table_from_rows("samples", rows).cast(SCHEMAS["samples"]), temporary)
    return len(shard.members)
