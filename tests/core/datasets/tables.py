"""Tiny data sets of every layout, and an encoder that needs no model."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

SIDE = 16


class MeanEncoder:
    """Latents are the mean colours of 4 x 4 tiles; counts the images it was given."""

    latent_shape = (3, 4, 4)
    height = width = SIDE

    def __init__(self) -> None:
        self.images = 0

    def __call__(self, images_BHWC: np.ndarray) -> torch.Tensor:
        self.images += len(images_BHWC)
        tiles = torch.from_numpy(images_BHWC).float().unflatten(1, (4, 4)).unflatten(3, (4, 4))
        return tiles.mean(dim=(2, 4)).permute(0, 3, 1, 2)


def picture(seed: int, side: int = SIDE) -> bytes:
    """A PNG of one colour of its own."""
    colour = np.random.default_rng(seed).integers(0, 256, 3, dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(np.broadcast_to(colour, (side, side, 3)).copy()).save(stream, "PNG")
    return stream.getvalue()


def pairs(count: int, images: int) -> list[dict[str, Any]]:
    """Rows of Pick-a-Pic: winners are first, second and neither in turn; few images, so that they come again."""
    return [
        {"jpg_0": picture(row % images), "jpg_1": picture((row + 1) % images), "label_0": (1.0, 0.0, 0.5)[row % 3],
         "caption": f"prompt {row % 7}"}
        for row in range(count)
    ]  # fmt: skip


def write_parquet(path: Path, rows: list[dict[str, Any]], row_group: int = 100) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=row_group)
    return path
