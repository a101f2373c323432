"""Scorers that need nothing but the image: sizes, brightness, and the judge of the shapes world."""

import tempfile

import numpy as np
from PIL import Image

from d3po_core.errors import D3POError
from d3po_core.store.images import at_once

JPEG_QUALITY = 95


def jpeg_incompressibility(images: np.ndarray, prompts: list[str]) -> np.ndarray:
    """Size in kB (1000 bytes) of each image as JPEG of quality 95. Source: DDPO, arXiv 2305.13301, Section 5.1."""
    return np.array(at_once(_jpeg_bytes, images)) / 1000


def jpeg_compressibility(images: np.ndarray, prompts: list[str]) -> np.ndarray:
    """Minus the JPEG size in kB: smaller files score higher."""
    return -jpeg_incompressibility(images, prompts)


def brightness(images: np.ndarray, prompts: list[str]) -> np.ndarray:
    """Mean luma (ITU-R BT.601 weights) of each image, in [0, 1]."""
    # No matrix product: it may round one row otherwise than another, and equal images are to tie.
    return ((images.astype(np.float64) / 255).mean(axis=(1, 2)) * [0.299, 0.587, 0.114]).sum(axis=-1)


def prompt_alignment(images: np.ndarray, prompts: list[str]) -> np.ndarray:
    """1 where an image of the shapes world shows what its prompt says, else 0: d3po_core.scorers.shapes.drawn_right."""
    import torch

    from d3po_core.scorers import shapes

    try:
        right = shapes.drawn_right(torch.from_numpy(images).permute(0, 3, 1, 2) / 255, prompts)
    except ValueError as error:
        raise D3POError(f"scorer 'prompt_alignment': {error}") from None
    return right.double().numpy()


def _jpeg_bytes(image: np.ndarray) -> int:
    # A file, not memory: Pillow lets other threads run only while it packs into a file.
    with tempfile.TemporaryFile() as file:
        Image.fromarray(image).save(file, format="JPEG", quality=JPEG_QUALITY)
        return file.tell()
