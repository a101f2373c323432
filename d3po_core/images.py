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

from d3po_core.errors import D3POError
from d3po_core.tables import atomic_path

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
