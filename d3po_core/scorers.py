"""Proxy scorers: programs that judge images in place of people.

A scorer is a function ``(images, prompts) -> scores``:

    images    uint8 array ``[B, height, width, 3]``, RGB
    prompts   list of B strings
    scores    B finite numbers, higher is better

Your own is named in the configuration as ``package.module:function``.
"""

import importlib
import io
from collections.abc import Callable

import numpy as np
from PIL import Image

from d3po_core.errors import D3POError

Scorer = Callable[[np.ndarray, list[str]], np.ndarray]
JPEG_QUALITY = 95


def jpeg_incompressibility(images: np.ndarray, prompts: list[str]) -> np.ndarray:
    """Size in kB (1000 bytes) of each image as JPEG of quality 95. Source: DDPO, arXiv 2305.13301, Section 5.1."""
    return np.array([_jpeg_bytes(image) / 1000 for image in images])


def jpeg_compressibility(images: np.ndarray, prompts: list[str]) -> np.ndarray:
    """Minus the JPEG size in kB: smaller files score higher."""
    return -jpeg_incompressibility(images, prompts)


def brightness(images: np.ndarray, prompts: list[str]) -> np.ndarray:
    """Mean luma (ITU-R BT.601 weights) of each image, in [0, 1]."""
    return (images.astype(np.float64) / 255).mean(axis=(1, 2)) @ np.array([0.299, 0.587, 0.114])


def prompt_alignment(images: np.ndarray, prompts: list[str]) -> np.ndarray:
    """1 where an image of the shapes world shows what its prompt says, else 0: d3po_core.shapes.drawn_right."""
    import torch

    from d3po_core import shapes

    try:
        right = shapes.drawn_right(torch.from_numpy(images).permute(0, 3, 1, 2) / 255, prompts)
    except ValueError as error:
        raise D3POError(f"scorer 'prompt_alignment': {error}") from None
    return right.double().numpy()


def _jpeg_bytes(image: np.ndarray) -> int:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=JPEG_QUALITY)
    return buffer.tell()


BUILT_IN: dict[str, Scorer] = {
    "jpeg_compressibility": jpeg_compressibility,
    "jpeg_incompressibility": jpeg_incompressibility,
    "brightness": brightness,
    "prompt_alignment": prompt_alignment,
}


def load_scorer(name: str) -> Scorer:
    """Find a scorer by name; its results are checked at every call.

    Raises:
        D3POError: no such scorer.
    """
    if name in BUILT_IN:
        return _checked(name, BUILT_IN[name])
    module_name, separator, function_name = name.partition(":")
    if not separator:
        raise D3POError(
            f"scorer {name!r} is not known; expected one of {', '.join(BUILT_IN)}, or package.module:function"
        )
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except Exception as error:  # the user's module may raise anything while it is imported
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise D3POError(f"scorer {name!r} cannot be imported ({reason}); is its folder on PYTHONPATH?") from error
    if not callable(function):
        raise D3POError(
            f"scorer {name!r} is a {type(function).__name__}; expected a function (images, prompts) -> scores"
        )
    return _checked(name, function)


def _checked(name: str, scorer: Scorer) -> Scorer:
    def score(images: np.ndarray, prompts: list[str]) -> np.ndarray:
        try:
            scores = np.asarray(scorer(images, prompts), dtype=np.float64)
        except D3POError:
            raise
        except Exception as error:
            raise D3POError(f"scorer {name!r} failed: {type(error).__name__}: {error}") from error
        if scores.shape != (len(images),):
            raise D3POError(
                f"scorer {name!r} returned shape {list(scores.shape)}; expected one number for each of {len(images)}"
            )
        if not np.isfinite(scores).all():
            bad = int(np.flatnonzero(~np.isfinite(scores))[0])
            raise D3POError(f"scorer {name!r} returned {scores[bad]} for image {bad}; expected finite numbers")
        return scores

    return score
