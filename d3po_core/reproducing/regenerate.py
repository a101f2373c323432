"""Draw an image again from its seeds and checkpoint.

Seeds alone fix an image only up to float rounding: matrix products round differently with another batch, thread count
or machine. So we draw its whole batch again. On the same machine with the same thread count, that gives the same bytes.
"""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from d3po_core.errors import D3POError
from d3po_core.image_ids import is_imported, number_of
from d3po_core.models.checkpoint import RECORD_FILE, computed_on, load_round
from d3po_core.models.policy import Policy
from d3po_core.queries.lookup import find_image
from d3po_core.sampling.rollout import Trajectories, draw_images
from d3po_core.seeds import ImageSeed, evaluation_seeds, member_seed
from d3po_core.store.campaign import round_config
from d3po_core.store.images import load_png, png_bytes
from d3po_core.store.stages import checkpoint_path
from d3po_core.store.tables import connect, partition, read_rows


@dataclass(frozen=True)
class Batch:
    """Images that were drawn together.

    Attributes:
        round: the round that drew them.
        checkpoint_round: the round whose checkpoint drew them; 0 is the base model.
        sample_ids: ids in the batch's order.
        seeds: each image's prompt and seeds.
        image_paths: each image's file, relative to the campaign.
        latent_dtype: dtype in which latents were stored.
    """

    round: int
    checkpoint_round: int
    sample_ids: tuple[str, ...]
    seeds: tuple[ImageSeed, ...]
    image_paths: tuple[str, ...]
    latent_dtype: torch.dtype


@dataclass(frozen=True)
class Regenerated:
    """An image drawn again, compared with the stored one.

    Attributes:
        image: uint8 ``[height, width, 3]``.
        sample_id: its id.
        stored: file of the stored image.
        same_bytes: whether its PNG file equals the stored one, byte for byte.
        largest_difference: largest difference of a pixel's channel, 0 to 255; None if the stored image is gone.
        batch_size: number of images in its batch.
        made_on: the round's ``computed_on``; None if it was not recorded.
        computed_on: device, threads, torch and processes of this run.
    """

    image: np.ndarray
    sample_id: str
    stored: Path
    same_bytes: bool
    largest_difference: int | None
    batch_size: int
    made_on: dict[str, Any] | None
    computed_on: dict[str, Any]


def regenerate(campaign: Path, sample_id: str, policy: Policy) -> Regenerated:
    """Draw an image again with the batch it was drawn in.

    Args:
        campaign: the campaign's folder.
        sample_id: id of a training or held-out image.
        policy: the model of the round's configuration; its weights are replaced.

    Raises:
        D3POError: there is no such image, its checkpoint is gone, or the tables do not match its seeds.
    """
    batch = batch_of(campaign, sample_id)
    row = batch.sample_ids.index(sample_id)
    image = redraw(campaign, batch, policy)[1][row]
    stored = campaign / batch.image_paths[row]
    return Regenerated(
        image=image,
        sample_id=sample_id,
        stored=stored,
        same_bytes=stored.exists() and png_bytes(image) == stored.read_bytes(),
        largest_difference=largest_difference(image, stored),
        batch_size=len(batch.seeds),
        made_on=made_on(campaign, batch.round),
        computed_on=computed_on(policy),
    )


def redraw(campaign: Path, batch: Batch, policy: Policy) -> tuple[Trajectories, np.ndarray]:
    """Draw a batch's trajectories and images again; the policy keeps the batch's checkpoint."""
    load_round(campaign, batch.checkpoint_round, policy)
    return draw_images(policy, round_config(campaign, batch.round).sample, list(batch.seeds), batch.latent_dtype)


def largest_difference(image: np.ndarray, stored: Path) -> int | None:
    """Return the largest difference of a pixel's channel from a stored image, 0 to 255; None if it is gone."""
    if not stored.exists():
        return None
    return int(np.abs(image.astype(int) - load_png(stored).astype(int)).max())


def made_on(campaign: Path, round_number: int) -> dict[str, Any] | None:
    """Return device, threads, torch and processes of a round's checkpoint; None if not recorded."""
    path = campaign / str(checkpoint_path(round_number)) / RECORD_FILE
    record = json.loads(path.read_text()) if path.exists() else {}
    if "threads" not in record:
        return None
    # Older records name no processes: there was only one.
    return {key: record[key] for key in ("device", "threads", "torch")} | {"processes": record.get("processes", 1)}


def batch_of(campaign: Path, sample_id: str) -> Batch:
    """Return the batch that an image was drawn in.

    Raises:
        D3POError: there is no such image, it comes from a data set, or the tables do not match its seeds.
    """
    with connect(campaign) as connection:
        image, held_out = find_image(connection, campaign, sample_id)
    if not held_out and is_imported(image["trajectory_path"]):
        raise D3POError(
            f"sample {sample_id!r} comes from a data set, so no model can draw it again; its file is "
            f"{campaign / image['image_path']}"
        )
    if not held_out:
        return training_batches(campaign, image["round"])[image["trajectory_path"]]
    return next(batch for batch in held_out_batches(campaign, image["round"]) if sample_id in batch.sample_ids)


def checkpoint_round(checkpoint: str | None) -> int:
    """Return the round of a checkpoint named as in tables; None is the base model, round 0."""
    return int(checkpoint.rpartition("=")[2]) if checkpoint else 0


def training_batches(campaign: Path, round_number: int) -> dict[str, Batch]:
    """Return the batches of a round's sampled images, by trajectory file.

    Raises:
        D3POError: a stored seed is not the one that the image's place in the round gives.
    """
    config = round_config(campaign, round_number)
    rows = read_rows(partition(campaign, "samples", round_number) / "part.parquet")
    # The number of earlier groups with the same prompt tells groups apart; rows of several sizes are out of order.
    prompt_of = {row["group_id"]: row["prompt"] for row in rows}
    seen: Counter[str] = Counter()
    occurrence = {}
    for group_id, prompt in sorted(prompt_of.items(), key=lambda group: number_of(group[0])):
        occurrence[group_id] = seen[prompt]
        seen[prompt] += 1
    batches: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if not is_imported(row["trajectory_path"]):
            batches.setdefault(row["trajectory_path"], []).append(row)

    def seed(row: dict[str, Any]) -> ImageSeed:
        shared = config.sample.share_initial_latent
        place = (row["prompt"], occurrence[row["group_id"]], row["member"])
        return member_seed(config.seed, round_number, *place, shared, config.sample.image_sizes)

    dtype: torch.dtype = getattr(torch, config.sample.latent_dtype)
    return {
        path: _batch(round_number, members, [seed(row) for row in members], dtype) for path, members in batches.items()
    }


def held_out_batches(campaign: Path, round_number: int) -> list[Batch]:
    """Return the batches of a round's held-out images, in order.

    Raises:
        D3POError: a stored seed is not the one that the image's place in the evaluation gives.
    """
    config = round_config(campaign, round_number)
    rows = read_rows(partition(campaign, "evaluations", round_number) / "part.parquet")
    rows = list({row["sample_id"]: row for row in rows}.values())  # there is one row per scorer
    prompts = list(dict.fromkeys(row["prompt"] for row in rows))
    seeds = evaluation_seeds(prompts, config.evaluate.images_per_prompt, config.seed, config.held_out_size)
    size = config.sample.batch_size
    return [
        _batch(round_number, rows[i : i + size], seeds[i : i + size], torch.float32) for i in range(0, len(rows), size)
    ]


def _batch(round_number: int, rows: list[dict[str, Any]], seeds: list[ImageSeed], dtype: torch.dtype) -> Batch:
    for row, seed in zip(rows, seeds, strict=True):
        if (row["prompt"], row["seed"]) != (seed.prompt, seed.noise_seed):
            raise D3POError(
                f"sample {row['sample_id']!r}: its stored seed {row['seed']} is not the one that its prompt and place "
                f"in round {round_number} give; the tables of that round were changed, restore them"
            )
    return Batch(
        round=round_number,
        checkpoint_round=checkpoint_round(rows[0]["checkpoint"]),
        sample_ids=tuple(row["sample_id"] for row in rows),
        seeds=tuple(seeds),
        image_paths=tuple(row["image_path"] for row in rows),
        latent_dtype=dtype,
    )
