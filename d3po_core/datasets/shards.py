"""Encode a few rows of a data set at a time; a finished shard is never made again.

A shard is up to ``ROWS`` rows of one table. Its latents and images are written first, its rows last, so that its file
of rows exists exactly when the shard is whole. An image is known by the SHA-256 of its file: the first shard that has
it encodes it, later ones only name it.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save

from d3po_core.datasets.layouts import Entry, RowError
from d3po_core.datasets.pictures import file_bytes, fitted, sha256
from d3po_core.datasets.sources import Source
from d3po_core.errors import D3POError
from d3po_core.models.encoding import Encoder
from d3po_core.store.files import atomic_path
from d3po_core.store.images import at_once, png_bytes

ROWS = 64
# A row per image of a usable row, or one row that says why a row was left out. Rows count from 1.
SCHEMA = pa.schema(
    [("source", pa.int64()), ("row", pa.int64()), ("place", pa.int64()), ("prompt", pa.string()), ("kind", pa.string()),
     ("value", pa.float64()), ("sha256", pa.string()), ("latent_row", pa.int64()), ("shard", pa.string()),
     ("shard_sha256", pa.string()), ("problem", pa.string())]
)  # fmt: skip


def rows_path(folder: Path, source: int, first: int) -> Path:
    """Return the file of the shard that begins at a row (from 0) of a table."""
    return folder / "shards" / f"{source:04d}-{first:09d}.parquet"


def image_path(folder: Path, digest: str) -> Path:
    """Return the PNG of an image at the model's size."""
    return folder / "images" / digest[:2] / f"{digest}.png"


def known_images(folder: Path) -> set[str]:
    """Return the digests of the images that finished shards have encoded."""
    known: set[str] = set()
    for path in (folder / "shards").glob("*.parquet"):
        table = pq.read_table(path, columns=["sha256", "latent_row"])
        known.update(table.filter(table["latent_row"].is_valid())["sha256"].to_pylist())
    return known


@dataclass
class ShardWriter:
    """Makes shards in a data set's folder.

    Attributes:
        folder: the data set's folder.
        make_encoder: loads the VAE, when the first shard needs it.
        latent_dtype: number format of stored latents.
        known: digests of the images that are encoded already.
    """

    folder: Path
    make_encoder: Callable[[], Encoder]
    latent_dtype: torch.dtype
    known: set[str]

    @cached_property
    def encoder(self) -> Encoder:
        """Return the VAE, loaded once."""
        return self.make_encoder()

    def write(self, source: Source, number: int, first: int, rows: list[dict[str, Any]]) -> None:
        """Make the shard of these rows.

        Args:
            source: their table.
            number: its number.
            first: the first row's number, from 0.
            rows: the rows, under our names.

        Raises:
            D3POError: the VAE gives latents that are not finite.
        """
        read = [_read(source, row) for row in rows]
        pixels, broken = self._fitted(read)
        read = [one.unless(broken) for one in read]
        used = {digest for one in read for digest in one.data}
        fresh = {digest: image for digest, image in pixels.items() if digest in used}
        path = rows_path(self.folder, number, first)
        shard = self._write_images(path.with_suffix(".safetensors"), fresh) if fresh else {}
        row_of = {digest: place for place, digest in enumerate(fresh)}
        table = []
        for place, one in enumerate(read):
            for said in one.said():
                new = row_of.pop(said.get("sha256", ""), None)  # the first row of an image says where its latent is
                where = {} if new is None else {"latent_row": new, **shard}
                table.append({"source": number, "row": first + place + 1, **said, **where})
        with atomic_path(path) as temporary:
            pq.write_table(pa.Table.from_pylist(table, schema=SCHEMA), temporary, compression="zstd")
        self.known.update(fresh)

    def _fitted(self, read: list["_Read"]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
        """Return the pixels of every image that nobody has encoded, by its digest, and why others have none."""
        files = {digest: data for one in read for digest, data in one.data.items() if digest not in self.known}
        if not files:
            return {}, {}
        size = self.encoder.height, self.encoder.width
        found = dict(zip(files, at_once(lambda data: _fitted_or_not(data, *size), files.values()), strict=True))
        return (
            {digest: image for digest, image in found.items() if not isinstance(image, str)},
            {digest: why for digest, why in found.items() if isinstance(why, str)},
        )

    def _write_images(self, path: Path, fresh: dict[str, np.ndarray]) -> dict[str, str]:
        """Write latents and images; return the latents' file with its digest."""
        images_BHWC = np.stack(list(fresh.values()))
        latents_BCHW = self.encoder(images_BHWC).to(self.latent_dtype)
        if not latents_BCHW.isfinite().all():
            raise D3POError(
                "the VAE's latents are not finite; half precision may overflow: set model.precision to bf16 or no, or "
                "sample.latent_dtype to float32"
            )
        content = save({"latents": latents_BCHW.contiguous()})
        for digest, png in zip(fresh, at_once(png_bytes, images_BHWC), strict=True):
            with atomic_path(image_path(self.folder, digest)) as temporary:
                temporary.write_bytes(png)
        with atomic_path(path) as temporary:
            temporary.write_bytes(content)
        return {"shard": path.name, "shard_sha256": hashlib.sha256(content).hexdigest()}


@dataclass(frozen=True)
class _Read:
    """A row that was read, with the bytes of its image files by digest; or the problem that keeps it out."""

    entry: Entry | None = None
    digests: tuple[str, ...] = ()
    data: Mapping[str, bytes] = field(default_factory=dict)
    problem: str | None = None

    def unless(self, broken: Mapping[str, str]) -> "_Read":
        """Return this row, or a row with a problem if one of its images has one."""
        why = next((broken[digest] for digest in self.digests if digest in broken), None)
        return self if why is None else _Read(problem=why)

    def said(self) -> list[dict[str, Any]]:
        """Return a row of the shard per image, or one with the problem."""
        if self.entry is None:
            return [{"problem": self.problem}]
        about = {"prompt": self.entry.prompt, "kind": self.entry.kind}
        pairs = zip(self.entry.values, self.digests, strict=True)
        return [{"place": place, "value": value, "sha256": own, **about} for place, (value, own) in enumerate(pairs)]


def _read(source: Source, row: dict[str, Any]) -> _Read:
    try:
        entry = source.layout.read(row, source.columns)
        files = [file_bytes(image, source.path.parent) for image in entry.images]
    except RowError as error:
        return _Read(problem=str(error))
    digests = tuple(sha256(data) for data in files)
    return _Read(entry, digests, dict(zip(digests, files, strict=True)))


def _fitted_or_not(data: bytes, height: int, width: int) -> np.ndarray | str:
    try:
        return fitted(data, height, width)
    except RowError as error:
        return str(error)
