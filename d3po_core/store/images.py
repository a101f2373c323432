"""Image files: lossless PNG, sheets of many images, and how much images differ."""

import contextlib
import io
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image, ImageOps

from d3po_core.errors import D3POError
from d3po_core.store.files import atomic_path

SMALL = 64  # pixels per side at which images are compared

Result = TypeVar("Result")

THREADS = min(16, os.cpu_count() or 1)
# Each thread that packs images slows the one that feeds the GPU. On two cores an operation took 2.1 us alone, 4.3
# beside 2 threads and 9.9 beside 8.
THREADS_BESIDE_A_GPU = min(2, THREADS)
_threads: ContextVar[int] = ContextVar("threads", default=THREADS)


@contextlib.contextmanager
def beside_a_gpu() -> Iterator[None]:
    """Use few image threads within this context, in the thread that enters it."""
    before = _threads.set(THREADS_BESIDE_A_GPU)
    try:
        yield
    finally:
        _threads.reset(before)


def save_png(image: np.ndarray, path: Path) -> None:
    """Write a uint8 ``[height, width, 3]`` image losslessly, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(png_bytes(image))


def pngs_bytes(images: np.ndarray) -> list[bytes]:
    """Return uint8 images ``[B, height, width, 3]`` as PNG files, packed several at a time."""
    return at_once(png_bytes, images)


def png_bytes(image: np.ndarray) -> bytes:
    """Return a uint8 ``[height, width, 3]`` image as the bytes of a PNG file."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, format="PNG", compress_level=1)
    return stream.getvalue()


def load_png(path: Path) -> np.ndarray:
    """Read an image as uint8 ``[height, width, 3]``.

    Raises:
        D3POError: the file is damaged.
        FileNotFoundError: the file is gone; images may be removed on purpose.
    """
    try:
        return np.asarray(Image.open(path).convert("RGB"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise D3POError(
            f"{path}: is no readable image ({error}); restore it, or draw it again: d3po regenerate ID"
        ) from None


def aspect(path: Path) -> float:
    """Return an image's width as a multiple of its height, from the file's first bytes; 1 if it cannot be read."""
    try:
        with Image.open(path) as image:
            return image.width / image.height
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return 1.0


def load_pngs(paths: list[Path]) -> np.ndarray:
    """Read images of one size as uint8 ``[B, height, width, 3]``, several at a time."""
    return np.stack(at_once(load_png, paths))


def at_once(function: Callable[..., Result], *items: Iterable[Any]) -> list[Result]:
    """Return the list that ``map`` gives, with several threads; for functions that release the GIL."""
    with ThreadPoolExecutor(_threads.get()) as pool:
        return list(pool.map(function, *items))


def sheet(images: Sequence[np.ndarray], columns: int, cell: int = 128) -> Image.Image:
    """Lay images out row by row, each whole within a square cell of the given pixels, with a thin gap."""
    rows = math.ceil(len(images) / columns)
    gap = 4
    canvas = Image.new("RGB", (columns * (cell + gap) + gap, rows * (cell + gap) + gap), "white")
    for index, array in enumerate(images):
        tile = ImageOps.pad(Image.fromarray(array), (cell, cell), Image.Resampling.LANCZOS, color="white")
        canvas.paste(tile, (gap + index % columns * (cell + gap), gap + index // columns * (cell + gap)))
    return canvas


def diversity(images: np.ndarray) -> float:
    """Return how much images of one prompt differ: mean over pairs of the mean absolute pixel difference.

    Args:
        images: uint8 ``[K, height, width, 3]``.

    Returns:
        0 (all alike) to 1 (black and white); NaN for fewer than two images. It measures colour and place, not meaning,
        so compare it between checkpoints on the same prompts and seeds, not between prompts.
    """
    from scipy.spatial.distance import pdist  # takes half a second to import, and most commands need none

    if len(images) < 2:
        return float("nan")
    flat = images.reshape(len(images), -1) / 255.0
    return float(pdist(flat, "cityblock").mean() / flat.shape[1])


def diversity_by_prompt(prompts: list[str], paths: list[Path]) -> dict[str, float]:
    """Return each prompt's diversity over images ``[I]``; leave out prompts with fewer than two images on disk."""
    groups: dict[str, list[Path]] = {}
    for prompt, path in zip(prompts, paths, strict=True):
        if path.is_file():
            groups.setdefault(prompt, []).append(path)
    return {prompt: diversity(load_pngs(group)) for prompt, group in groups.items() if len(group) > 1}


def dissimilarity(images_MHWC: np.ndarray) -> float:
    """Return how different a group's images look: mean absolute pixel difference over all pairs, in [0, 1].

    Args:
        images_MHWC: uint8 ``[M, height, width, 3]``; compared at no more than 64 pixels per side.
    """
    small_MP = np.stack([_shrunk(image) for image in images_MHWC])
    first, second = np.triu_indices(len(small_MP), k=1)
    return float(np.abs(small_MP[first] - small_MP[second]).mean())


def _shrunk(image_HWC: np.ndarray) -> np.ndarray:
    height, width = image_HWC.shape[:2]
    image = Image.fromarray(image_HWC).resize((min(width, SMALL), min(height, SMALL)), Image.Resampling.BOX)
    return np.asarray(image, dtype=np.float32).ravel() / 255
