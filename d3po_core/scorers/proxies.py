"""Scorers without weights: file sizes, brightness, and the judge of the shapes world."""

import tempfile

import numpy as np
from PIL import Image

from d3po_core.errors import D3POError
from d3po_core.store.images import at_once

JPEG_QUALITY = 95


def jpeg_incompressibility(images: np.ndarray, prompts: list[str]) -> np.ndarray:
    """Return each image's size in kB (1000 bytes) as JPEG at quality 95.

    Source: DDPO, arXiv 2305.13301, Section 5.1.
    """
    return np.array(at_once(_jpeg_bytes, images)) / 1000


def jpeg_compressibility(images: np.ndarray, prompts: list[str]) -> np.ndarray:
    """Return minus the JPEG size in kB, so that smaller files score higher."""
    return -jpeg_incompressibility(images, prompts)


def brightness(images: np.ndarray, prompts: list[str]) -> np.ndarray:
    """Return each image's mean luma (ITU-R BT.601 weights), in [0, 1]."""
    # No matrix product: it may round rows differently, and equal images must tie.
    return ((images.astype(np.float64) / 255).mean(axis=(1, 2)) * [0.299, 0.587, 0.114]).sum(axis=-1)


def prompt_alignment(images: np.ndarray, prompts: list[str]) -> np.ndarray:
    """Return 1 for shapes-world images that show their prompt, else 0: see d3po_core.scorers.shapes.drawn_right."""
    import torch

    from d3po_core.scorers import shapes

    try:
        right = shapes.drawn_right(torch.from_numpy(images).permute(0, 3, 1, 2) / 255, prompts)
    except ValueError as error:
        raise D3POError(f"scorer 'prompt_alignment': {error}") from None
    return right.double().numpy()


def _jpeg_bytes(image: np.ndarray) -> int:
    # A file, not memory: Pillow releases the GIL only while it encodes into a file.
    with tempfile.TemporaryFile() as file:
        Image.fromarray(image).save(file, format="JPEG", quality=JPEG_QUALITY)
        return file.tell()
