"""Sample: groups of images from the last checkpoint, with their trajectories."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from prefect import task
from safetensors.torch import save_file

from d3po_core.campaign import checkpoint_path, finish_stage, start_of
from d3po_core.config import CampaignConfig
from d3po_core.images import load_png, save_pngs, sheet
from d3po_core.prompts import draw_prompts, load_prompts
from d3po_core.records import SampleRecord
from d3po_core.rollout import Drawn, ImageSeed, member_seed, start_drawing
from d3po_core.tables import SCHEMAS, atomic_path, table_from_rows, write_table
from tasks import tracking
from tasks.stage import STAGE_OPTIONS, gpu_turn, loaded_policy, policy_at, progress

SHEET_IMAGES = 64

# sample_id, group_id, place in the group, what it is made from
Member = tuple[str, str, int, ImageSeed]


@task(name="sample", **STAGE_OPTIONS)
def sample_images(config: CampaignConfig, round_number: int) -> SampleRecord:
    """Sample the round's groups with the checkpoint of the round before."""
    record = finish_stage(config.folder, round_number, "sample", SampleRecord, lambda: _sample(config, round_number))
    tracking.deliver(config)
    return record


def round_members(config: CampaignConfig, round_number: int) -> list[list[Member]]:
    """The members of the round's groups.

    Every seed is a hash of (campaign seed, round, prompt, how often the prompt came before, member).
    """
    prompts = load_prompts(config.sample.prompts, config.sample.prompt_column, "sample.prompts")
    drawn = draw_prompts(prompts, config.sample.groups_per_round, config.seed, round_number)
    groups = []
    for index, (prompt, occurrence) in enumerate(drawn):
        group_id = f"r{round_number}-g{index}"
        shared = config.sample.share_initial_latent
        groups.append(
            [
                (
                    f"{group_id}-m{member}", group_id, member,
                    member_seed(config.seed, round_number, prompt, occurrence, member, shared),
                )
                for member in range(config.sample.group_size)
            ]
        )  # fmt: skip
    return groups


def _sample(config: CampaignConfig, round_number: int) -> SampleRecord:
    policy = policy_at(config, start_of(config.folder, round_number))
    groups = round_members(config, round_number)
    per_shard = max(1, config.sample.batch_size // config.sample.group_size)
    shards = [list(chain(*groups[i : i + per_shard])) for i in range(0, len(groups), per_shard)]
    staging = config.folder / "staging" / f"round={round_number}"
    # A shard's rows are written last: what a killed run finished is not sampled again.
    rows_paths = [staging / f"shard-{index:04d}.parquet" for index in range(len(shards))]
    total = config.sample.images_per_round
    done = sum(len(shard) for shard, path in zip(shards, rows_paths, strict=True) if path.exists())
    with gpu_turn(policy.device.type), progress(config, round_number, "sample", total, "image", done) as bar:
        for images in _sample_shards(config, round_number, shards, rows_paths):
            bar.update(images)
    table = pa.concat_tables([pq.ParquetFile(path).read() for path in rows_paths])
    write_table(config.folder, "samples", round_number, table)
    contact_sheet = _contact_sheet(config, round_number, table["image_path"].to_pylist()[:SHEET_IMAGES])
    return SampleRecord(
        num_samples=len(table),
        checkpoint=checkpoint_path(start_of(config.folder, round_number)),
        contact_sheet=contact_sheet,
    )


def _sample_shards(
    config: CampaignConfig, round_number: int, shards: list[list[Member]], rows_paths: list[Path]
) -> Iterator[int]:
    """Sample and write the shards that are not there yet, yielding how many images were written."""
    with ThreadPoolExecutor(1, thread_name_prefix="write") as writer:
        # While one shard is being written the next is being sampled; no more than that waits in memory.
        writing: Future[int] | None = None
        for index, (members, rows_path) in enumerate(zip(shards, rows_paths, strict=True)):
            if rows_path.exists():
                continue
            drawn = _start_shard(config, members)
            if writing:
                yield writing.result()
            writing = writer.submit(_write_shard, config, round_number, index, members, drawn, rows_path)
        if writing:
            yield writing.result()


def _start_shard(config: CampaignConfig, members: list[Member]) -> Drawn:
    seeds = [seed for *_, seed in members]
    return start_drawing(loaded_policy(config), config.sample, seeds, getattr(torch, config.sample.latent_dtype))


def _write_shard(
    config: CampaignConfig, round_number: int, index: int, members: list[Member], drawn: Drawn, rows_path: Path
) -> int:
    trajectories, images = drawn.wait()
    # Asked of the family: the policy's schedule is on the GPU, and to read from there is to wait for the next shard.
    schedule = loaded_policy(config).family.schedule(config.sample.num_steps, config.sample.eta)
    trajectory_path = f"trajectories/round={round_number}/shard-{index:04d}.safetensors"
    with atomic_path(config.folder / trajectory_path) as temporary:
        save_file(
            {
                "latents": trajectories.latents_BTCHW.contiguous(),
                "log_probs": trajectories.log_probs_BT,
                "timesteps": schedule.timesteps_T,
            },
            temporary,
        )
    image_paths = [f"images/round={round_number}/{sample_id}.png" for sample_id, *_ in members]
    save_pngs(images, [config.folder / path for path in image_paths])
    rows = []
    for row, (sample_id, group_id, member, seed) in enumerate(members):
        rows.append(
            {
                "sample_id": sample_id, "group_id": group_id, "member": member, "prompt": seed.prompt,
                "split": "train", "seed": seed.noise_seed, "image_path": image_paths[row],
                "trajectory_path": trajectory_path, "trajectory_row": row,
                "checkpoint": checkpoint_path(start_of(config.folder, round_number)),
            }
        )  # fmt: skip
    with atomic_path(rows_path) as temporary:
        pq.write_table(table_from_rows("samples", rows).cast(SCHEMAS["samples"]), temporary)
    return len(members)


def _contact_sheet(config: CampaignConfig, round_number: int, image_paths: list[str]) -> str:
    images = np.stack([load_png(config.folder / path) for path in image_paths])
    relative = f"images/round={round_number}/contact_sheet.png"
    size = config.sample.group_size
    columns = size * max(1, 12 // size)  # whole groups side by side
    with atomic_path(config.folder / relative) as temporary:
        sheet(images, columns, cell=96).save(temporary, format="PNG")
    return relative
