"""Pictures for a report: small WebP images in the page, one sheet per checkpoint, and a comparison file."""

import base64
import contextlib
import hashlib
import io
import json
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from d3po_core.errors import D3POError
from d3po_core.evaluation.comparison import HeldOut
from d3po_core.store.at_hand import bring_paths
from d3po_core.store.files import atomic_path
from d3po_core.store.images import diversity_by_prompt

SHEET_PROMPTS, SHEET_SEEDS = 6, 6
# Fifty sheets in base64 take less than four of the page's five megabytes.
SHEETS, SHEET_BYTES = 50, 56_000
_SIZES = ((160, 80), (112, 75), (80, 65), (56, 55), (40, 40), (24, 30))  # pixels per tile, quality
_MISSING = (136, 136, 136)


@dataclass(frozen=True)
class RoundPictures:
    """A sheet of a round's held-out images as a data URI, and each prompt's diversity."""

    sheet: str | None  # None when none of its images is on disk
    diversity: dict[str, float]


def choose(held_out: HeldOut, prompts: int = SHEET_PROMPTS, seeds: int = SHEET_SEEDS) -> list[list[int]]:
    """Return positions of the images to show, one row per prompt.

    The prompts are spread over the list; each shows its first seeds.
    """
    by_prompt: dict[str, list[int]] = {}
    for index, prompt in enumerate(held_out.prompts):
        by_prompt.setdefault(prompt, []).append(index)
    rows = list(by_prompt.values())
    picked = np.unique(np.linspace(0, len(rows) - 1, min(prompts, len(rows))).round().astype(int))
    columns = min(seeds, min(len(row) for row in rows))
    return [rows[i][:columns] for i in picked]


def round_pictures(campaign: Path, round_number: int, key: list[Any], held_out: HeldOut, row: int) -> RoundPictures:
    """Return a round's pictures, cached in ``report/round=N.json`` since images may be pruned later.

    Args:
        campaign: the campaign's folder.
        round_number: the round.
        key: the campaign and LoRA that the images depend on, besides prompts and seeds; a new key redraws.
        held_out: the images of all rounds.
        row: the round's row in ``held_out``.
    """
    chosen = choose(held_out)
    shown = [[held_out.prompts[i], held_out.seeds[i]] for line in chosen for i in line]
    digest = hashlib.sha256(json.dumps([key, shown, SHEET_BYTES, _SIZES]).encode()).hexdigest()
    kept = campaign / "report" / f"round={round_number}.json"
    with contextlib.suppress(OSError, ValueError, KeyError):
        saved = json.loads(kept.read_text())
        if saved["key"] == digest:
            return RoundPictures(saved["sheet"], saved["diversity"])
    paths = held_out.image_paths[row]
    bring_paths(paths)
    sheet = _sheet([[paths[i] for i in line] for line in chosen])
    made = RoundPictures(sheet, diversity_by_prompt(held_out.prompts, paths))
    if all(path.is_file() for path in paths):
        # If the folder cannot be written, the next report only takes some seconds longer.
        with contextlib.suppress(D3POError), atomic_path(kept) as temporary:
            temporary.write_text(json.dumps({"key": digest, "sheet": made.sheet, "diversity": made.diversity}))
    return made


def _sheet(paths: list[list[Path]]) -> str | None:
    images = [[_open(path) for path in line] for line in paths]
    widest = max((image.width for line in images for image in line if image), default=0)
    if not widest:
        return None
    data = b""
    # Never enlarge images. Use smaller, more compressed tiles until the sheet fits.
    first = sum(size >= widest for size, _ in _SIZES[1:])
    for size, quality in _SIZES[first:]:
        cell = min(size, widest)
        canvas = Image.new("RGB", (cell * len(images[0]), cell * len(images)), _MISSING)
        for y, line in enumerate(images):
            for x, image in enumerate(line):
                if image:
                    canvas.paste(_square(image, cell), (x * cell, y * cell))
        data = _webp(canvas, quality if data else 80)
        if len(data) <= SHEET_BYTES:
            break
    return _data_uri(data)


def thumbnail(path: Path, size: int = 128) -> str | None:
    """Return an image as a small data URI; None if it is not on disk."""
    bring_paths([path])
    image = _open(path)
    return _data_uri(_webp(_square(image, min(size, image.width)), 80)) if image else None


def _open(path: Path) -> Image.Image | None:
    try:
        return Image.open(path).convert("RGB")
    except OSError:  # pruned, or not an image
        return None


def _square(image: Image.Image, cell: int) -> Image.Image:
    """Return the whole image within a square cell."""
    return ImageOps.pad(image, (cell, cell), Image.Resampling.LANCZOS, color=_MISSING)


def _webp(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", quality=quality, method=4)
    return buffer.getvalue()


def _data_uri(data: bytes) -> str:
    return "data:image/webp;base64," + base64.b64encode(data).decode()


def comparison_picture(held_out: HeldOut, labels: list[str], output: Path, prompts: int = 6, seeds: int = 2) -> Path:
    """Write a PNG, whole or not at all, with one row per checkpoint and one column per prompt and seed.

    Args:
        held_out: images and scores of the checkpoints.
        labels: a name for each checkpoint.
        output: the file to write.
        prompts: at most how many prompts.
        seeds: at most how many images per prompt.

    Raises:
        D3POError: none of the images is on disk, or the file cannot be written.
    """
    cell, gap, margin, head = 96, 4, 150, 64
    chosen = choose(held_out, prompts, seeds)
    group = len(chosen[0]) * (cell + gap) + 2 * gap
    canvas = Image.new("RGB", (margin + group * len(chosen), head + len(labels) * (cell + gap) + gap), "white")
    draw, font, found = ImageDraw.Draw(canvas), _font(13), False
    for column, line in enumerate(chosen):
        left = margin + column * group
        text = textwrap.shorten(held_out.prompts[line[0]], 75, placeholder="…")
        draw.text((left, 6), textwrap.fill(text, group // 8), "black", _font(11))
        for row, paths in enumerate(held_out.image_paths):
            for place, index in enumerate(line):
                image = _open(paths[index])
                found = found or image is not None
                tile = _square(image, cell) if image else Image.new("RGB", (cell, cell), _MISSING)
                canvas.paste(tile, (left + place * (cell + gap), head + row * (cell + gap)))
    for row, label in enumerate(labels):
        draw.text((8, head + row * (cell + gap) + cell / 2 - 16), textwrap.fill(label, 18), "black", font)
    if not found:
        raise D3POError(f"none of the images of {', '.join(labels)} is on disk; they were removed")
    with atomic_path(output) as temporary:
        canvas.save(temporary, format="PNG")
    return output


def _font(size: int) -> Any:
    import matplotlib

    # Matplotlib's font covers most alphabets; Pillow's own covers only Latin.
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", size)
