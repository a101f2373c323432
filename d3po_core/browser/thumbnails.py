"""Small versions of images, made once and kept in memory."""

import io
from functools import lru_cache
from pathlib import Path

from PIL import Image, UnidentifiedImageError

EDGE = 320
_KEPT = 2_000


def thumbnail(path: Path) -> tuple[bytes, str] | None:
    """Return an image of at most ``EDGE`` pixels per side and its media type; None if the file cannot be read."""
    try:
        return _thumbnail(path, path.stat().st_mtime_ns)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError):
        return None


@lru_cache(_KEPT)
def _thumbnail(path: Path, _changed_at: int) -> tuple[bytes, str]:
    with Image.open(path) as image:
        if max(image.size) <= EDGE:
            return path.read_bytes(), Image.MIME[image.format or "PNG"]
        image.thumbnail((EDGE, EDGE))
        written = io.BytesIO()
        image.convert("RGB").save(written, "WEBP", quality=85)
    return written.getvalue(), "image/webp"
