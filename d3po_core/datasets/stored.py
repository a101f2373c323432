"""An imported data set on disk: its facts, its groups, and which groups a round draws.

import.json                    what the import began with
shards/*.parquet, .safetensors rows of the tables, and the latents of the images that they had first
images/<ab>/<sha256>.png       every image at the model's size
groups.parquet                 the groups that rounds draw
problems.csv                   the rows that were left out, and why
dataset.json                   facts and digests; it exists exactly when the import is finished
"""

import hashlib
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from safetensors import safe_open

from d3po_core.config import CampaignConfig, ModelConfig
from d3po_core.datasets.layouts import Kind
from d3po_core.errors import D3POError
from d3po_core.models.places import model_folder
from d3po_core.paths import HERE, absolute, data_folder, resolve_path
from d3po_core.seeds import derive_seed, permutation
from d3po_core.sizes import Size
from d3po_core.store.integrity import sha256_of
from d3po_core.store.sealed import read_sealed

FACTS = "dataset.json"
GROUPS = "groups.parquet"
REMEDY = "restore it from a copy, or import the data set again: d3po import-dataset"


@dataclass(frozen=True)
class Group:
    """Images of one prompt and what was said of each.

    Attributes:
        prompt: their prompt.
        kind: as in ``layouts.Entry``.
        values: one per image.
        sha256: the digests of their files as they were imported.
        shard: the file with each image's latent; row: its row there.
    """

    prompt: str
    kind: Kind
    values: tuple[float, ...]
    sha256: tuple[str, ...]
    shard: tuple[str, ...]
    row: tuple[int, ...]


def one_size(config: CampaignConfig) -> Size | None:
    """Return height and width of the images of a data set for this campaign; None for the network's native size.

    Raises:
        D3POError: the campaign has several sizes.
    """
    if config.sample.sizes:
        raise D3POError(
            "sample.sizes is set, and a data set is encoded at one size; set sample.height and sample.width instead"
        )
    (size,) = config.sample.image_sizes
    return size


def dataset_folder(name: str) -> Path:
    """Return a data set's folder: in the data folder by its name, or the folder itself."""
    if os.sep in name:
        return absolute(name, HERE, "sample.dataset")
    return data_folder() / "datasets" / name


@dataclass(frozen=True)
class Dataset:
    """A finished data set."""

    folder: Path
    facts: dict[str, Any]

    @property
    def name(self) -> str:
        """Return its name, which judgements have as their rater."""
        return self.folder.name

    @cached_property
    def _table(self) -> Any:
        path = self.folder / GROUPS
        if not path.is_file() or sha256_of(path) != self.facts["groups_sha256"]:
            raise D3POError(f"{path}: is gone or damaged; {REMEDY}")
        return pq.read_table(path)

    def prompts(self) -> list[str]:
        """Return the distinct prompts of its groups, in order."""
        return list(dict.fromkeys(self._table["prompt"].to_pylist()))

    def drawn(self, count: int, seed: int, round_number: int) -> list[Group]:
        """Return the groups of a round, 1 or later; rounds of as many groups draw each once before any comes again."""
        total, places = len(self._table), range((round_number - 1) * count, round_number * count)
        orders = {turn: permutation(derive_seed(seed, "dataset", turn), total) for turn in {p // total for p in places}}
        chosen = self._table.take([orders[place // total][place % total] for place in places])
        return [
            Group(row["prompt"], row["kind"], *(tuple(row[name]) for name in ("values", "sha256", "shard", "row")))
            for row in chosen.to_pylist()
        ]

    def latents(self, group: Group) -> torch.Tensor:
        """Return the latents of a group's images, ``[M, C, H, W]``."""
        found = []
        for shard, row in zip(group.shard, group.row, strict=True):
            path = self.folder / "shards" / shard
            if not path.is_file() or sha256_of(path) != self.facts["shards"][shard]:
                raise D3POError(f"{path}: is gone or damaged; {REMEDY}")
            with safe_open(path, framework="pt") as tensors:
                found.append(tensors.get_slice("latents")[row : row + 1])
        return torch.cat(found)


def open_dataset(name: str) -> Dataset:
    """Return a finished data set.

    Raises:
        D3POError: there is none of that name, or its import is not finished.
    """
    folder = dataset_folder(name)
    if not (folder / FACTS).exists():
        begun = (folder / "import.json").exists()
        others = sorted(path.parent.name for path in folder.parent.glob(f"*/{FACTS}"))
        what = "its import is not finished; type the same d3po import-dataset again" if begun else (
            f"no such data set in {folder.parent}; there are {', '.join(others) or 'none'}; "
            "import one: d3po import-dataset"
        )  # fmt: skip
        raise D3POError(f"sample.dataset {name!r}: {what}")
    return Dataset(folder, read_sealed(folder / FACTS, REMEDY))


def vae_sha256(config: ModelConfig) -> str | None:
    """Return the digest of a model's VAE, with its configuration; None if the model is not on this machine yet."""
    path, folder = resolve_path(config.path), model_folder(config)
    files = [path] if path.is_file() else sorted(folder.glob("vae/*")) if folder else []
    digests = [f"{file.name} {sha256_of(file)}" for file in files if file.suffix in (".json", ".safetensors")]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest() if digests else None
