"""Images of a data set: their bytes, and their pixels at the model's size."""

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from d3po_core.datasets.layouts import RowError


def file_bytes(image: Any, folder: Path) -> bytes:
    """Return the bytes of an image file as a table names it: bytes, a path, or a mapping with one of them.

    Args:
        image: the cell.
        folder: the folder that relative paths start at.

    Raises:
        RowError: it is none of these, or the file cannot be read.
    """
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, bytes) and image:
        return image
    if not isinstance(image, str) or not image:
        raise RowError("has no image")
    if "://" in image:
        raise RowError(f"image {image} is an address; download the images first")
    try:
        return (folder / image).read_bytes()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise RowError(f"image {image} cannot be read ({reason})") from None


def sha256(data: bytes) -> str:
    """Return the digest of an image file."""
    return hashlib.sha256(data).hexdigest()


def fitted(data: bytes, height: int, width: int) -> np.ndarray:
    """Return the pixels of an image file at a size, uint8 ``[height, width, 3]``.

    An image of another size is resized so that its shorter side fits, and the middle is cut out. It is turned as its
    EXIF says. Transparent parts keep their colour.

    Raises:
        RowError: it is no readable image.
    """
    try:
        with Image.open(io.BytesIO(data)) as file:
            image = ImageOps.exif_transpose(file).convert("RGB")
        if image.size != (width, height):
            image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
    except UnidentifiedImageError:
        raise RowError("holds no readable image (of no known format)") from None
    except Exception as error:  # decoders raise anything on damaged files
        raise RowError(f"holds no readable image ({' '.join(str(error).split())[:120]})") from None
    return np.asarray(image)
