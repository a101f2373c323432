"""Put a round's groups of a data set into the campaign: rows, latents, images and judgements, as if it had drawn them.

A round of a data set is a round like any other, without trajectories: the latents of an image are its x_0 alone. What
the data set says of its images becomes judgements by a rater of the data set's name, which derive into preferences as
everyone's do.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from PIL import Image
from safetensors.torch import save

from d3po_core.config import CampaignConfig
from d3po_core.datasets.shards import image_path
from d3po_core.datasets.stored import Dataset, Group, open_dataset
from d3po_core.errors import D3POError
from d3po_core.image_ids import IMPORTED_FILE, group_id, sample_id
from d3po_core.seeds import derive_seed
from d3po_core.store.files import atomic_path
from d3po_core.store.tables import SCHEMAS, table_from_rows

GROUPS_PER_FILE = 32


def write_imported(config: CampaignConfig, round_number: int) -> list[Path]:
    """Write the latents and images of the round's imported groups; return the files of their rows of ``samples``.

    A file of rows is written last, so that a resumed run skips what is whole.

    Raises:
        D3POError: the data set is gone or damaged.
    """
    if not config.sample.imported_groups:
        return []
    dataset, paths = open_dataset(str(config.sample.dataset)), []
    groups = list(_groups(config, round_number, dataset))
    for index, start in enumerate(range(0, len(groups), GROUPS_PER_FILE)):
        name = f"{IMPORTED_FILE}{index:04d}"
        path = config.folder / "staging" / f"round={round_number}" / f"{name}.parquet"
        if not path.exists():
            _write_file(config, round_number, dataset, name, groups[start : start + GROUPS_PER_FILE], path)
        paths.append(path)
    return paths


def imported_judgements(config: CampaignConfig, round_number: int, now: datetime) -> list[dict[str, Any]]:
    """Return what the data set says of the round's images, as rows of ``judgements``.

    Scores count like a scorer's. Choices, ranks and marks count like a person's.
    """
    if not config.sample.imported_groups:
        return []
    rows: list[dict[str, Any]] = []
    dataset = open_dataset(str(config.sample.dataset))
    for group, drawn in _groups(config, round_number, dataset):
        ids = [sample_id(group, member) for member in range(len(drawn.values))]
        said = [(ids[0], ids[1], drawn.values[0])] if drawn.kind == "choice" else [
            (image, None, value) for image, value in zip(ids, drawn.values, strict=True)
        ]  # fmt: skip
        rows += [
            {
                "rater": dataset.name, "rater_kind": "proxy" if drawn.kind == "score" else "human", "kind": drawn.kind,
                "sample_id": image, "other_id": other, "value": value, "judged_at": now,
                "source": f"data set {dataset.name}", "seconds": None, "position": None,
            }
            for image, other, value in said
        ]  # fmt: skip
    return rows


def _groups(config: CampaignConfig, round_number: int, dataset: Dataset) -> Iterator[tuple[str, Group]]:
    """Yield id and content of the round's imported groups; their numbers follow those of the sampled ones."""
    drawn = dataset.drawn(config.sample.imported_groups, config.seed, round_number)
    for index, group in enumerate(drawn, start=config.sample.sampled_groups):
        yield group_id(round_number, index), group


def _write_file(
    config: CampaignConfig, round_number: int, dataset: Dataset, name: str, groups: list[tuple[str, Group]], path: Path
) -> None:
    latents: list[torch.Tensor] = []
    rows: list[dict[str, Any]] = []
    trajectory_path = f"trajectories/round={round_number}/{name}.safetensors"
    for group, drawn in groups:
        latents.append(dataset.latents(drawn))
        for member, digest in enumerate(drawn.sha256):
            image = sample_id(group, member)
            png = f"images/round={round_number}/{image}.png"
            source = image_path(dataset.folder, digest)
            _copy(source, config.folder / png)
            with Image.open(source) as picture:
                width, height = picture.size
            rows.append({
                "sample_id": image, "group_id": group, "member": member, "prompt": drawn.prompt, "split": "train",
                "seed": derive_seed(config.seed, round_number, "dataset", group, member), "image_path": png,
                "trajectory_path": trajectory_path, "trajectory_row": len(rows), "checkpoint": None,
                "height": height, "width": width,
            })  # fmt: skip
    latents_BTCHW = torch.cat(latents)[:, None].to(getattr(torch, config.sample.latent_dtype))
    with atomic_path(config.folder / trajectory_path) as temporary:
        temporary.write_bytes(save({"latents": latents_BTCHW.contiguous()}))
    with atomic_path(path) as temporary:
        pq.write_table(table_from_rows("samples", rows).cast(SCHEMAS["samples"]), temporary)


def _copy(source: Path, target: Path) -> None:
    """Link a file into the campaign, or copy it to another file system.

    Raises:
        D3POError: the file is gone.
    """
    if not source.is_file():
        raise D3POError(f"{source}: is gone; restore it from a copy, or import the data set again under another --name")
    with atomic_path(target) as temporary:
        with contextlib.suppress(OSError):
            os.link(source, temporary)
        if not temporary.exists():
            shutil.copyfile(source, temporary)
