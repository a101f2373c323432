"""Image files: lossless PNG, and sheets of many images for people to look at."""

import contextlib
import io
import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image
from scipy.spatial.distance import pdist

from d3po_core.errors import D3POError
from d3po_core.store.files import atomic_path

SMALL = 64  # pixels a side at which images are compared

Result = TypeVar("Result")

THREADS = min(8, os.cpu_count() or 1)
# While a GPU works: each thread that packs images slows the one that hands work to the device. An operation took 2.1 us
# on two cores, 4.3 beside 2 threads, 9.9 beside 8.
THREADS_BESIDE_A_GPU = min(2, THREADS)
_threads: ContextVar[int] = ContextVar("threads", default=THREADS)


@contextlib.contextmanager
def beside_a_gpu() -> Iterator[None]:
    """Within this context, and the thread that enters it, few images are worked on at a time."""
    before = _threads.set(THREADS_BESIDE_A_GPU)
    try:
        yield
    finally:
        _threads.reset(before)


def save_png(image: np.ndarray, path: Path) -> None:
    """Write a uint8 ``[height, width, 3]`` image losslessly, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(png_bytes(image))


def save_pngs(images: np.ndarray, paths: list[Path]) -> None:
    """Write uint8 images ``[B, height, width, 3]``, several at a time: packing one holds a processor, not Python."""
    with beside_a_gpu():
        at_once(save_png, images, paths)


def png_bytes(image: np.ndarray) -> bytes:
    """A uint8 ``[height, width, 3]`` image as the content of a PNG file."""
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, format="PNG", compress_level=1)
    return stream.getvalue()


def load_png(path: Path) -> np.ndarray:
    """Read an image as uint8 ``[height, width, 3]``.

    Raises:
        D3POError: the file is damaged; FileNotFoundError passes, since images may be removed on purpose.
    """
    try:
        return np.asarray(Image.open(path).convert("RGB"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise D3POError(
            f"{path}: is no readable image ({error}); restore it, or draw it again: d3po regenerate ID"
        ) from None


def load_pngs(paths: list[Path]) -> np.ndarray:
    """Read images of one size as uint8 ``[B, height, width, 3]``, several at a time."""
    return np.stack(at_once(load_png, paths))


def at_once(function: Callable[..., Result], *items: Iterable[Any]) -> list[Result]:
    """What ``map`` gives, several at a time: for a function that holds a processor but not Python, as Pillow's do."""
    with ThreadPoolExecutor(_threads.get()) as pool:
        return list(pool.map(function, *items))


def sheet(images: np.ndarray, columns: int, cell: int = 128) -> Image.Image:
    """Lay images out row by row, each shrunk or enlarged to fit a cell of the given pixels, with a thin gap."""
    rows = math.ceil(len(images) / columns)
    gap = 4
    canvas = Image.new("RGB", (columns * (cell + gap) + gap, rows * (cell + gap) + gap), "white")
    for index, array in enumerate(images):
        tile = Image.fromarray(array).resize((cell, cell), Image.Resampling.LANCZOS)
        canvas.paste(tile, (gap + index % columns * (cell + gap), gap + index // columns * (cell + gap)))
    return canvas


def diversity(images: np.ndarray) -> float:
    """How much K images of one prompt differ: mean over their pairs of the mean absolute pixel difference.

    Args:
        images: uint8 ``[K, height, width, 3]``.

    Returns:
        0 (all alike) to 1 (black and white); NaN when there are fewer than two. It sees colour and place, not meaning:
        compare it between checkpoints on the same prompts and seeds, not between prompts.
    """
    if len(images) < 2:
        return float("nan")
    flat = images.reshape(len(images), -1) / 255.0
    return float(pdist(flat, "cityblock").mean() / flat.shape[1])


def diversity_by_prompt(prompts: list[str], paths: list[Path]) -> dict[str, float]:
    """Diversity of each prompt's images ``[I]``; a prompt of which fewer than two images are on disk is left out."""
    groups: dict[str, list[Path]] = {}
    for prompt, path in zip(prompts, paths, strict=True):
        if path.is_file():
            groups.setdefault(prompt, []).append(path)
    return {prompt: diversity(load_pngs(group)) for prompt, group in groups.items() if len(group) > 1}


def dissimilarity(images_MHWC: np.ndarray) -> float:
    """How different the images of a group look: mean absolute difference of pixels over all pairs, in [0, 1].

    Args:
        images_MHWC: uint8 ``[M, height, width, 3]``; compared at no more than 64 pixels a side.
    """
    small_MP = np.stack([_shrunk(image) for image in images_MHWC])
    first, second = np.triu_indices(len(small_MP), k=1)
    return float(np.abs(small_MP[first] - small_MP[second]).mean())


def _shrunk(image_HWC: np.ndarray) -> np.ndarray:
    height, width = image_HWC.shape[:2]
    image = Image.fromarray(image_HWC).resize((min(width, SMALL), min(height, SMALL)), Image.Resampling.BOX)
    return np.asarray(image, dtype=np.float32).ravel() / 255
