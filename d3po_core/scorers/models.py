"""Learned scorers: their list, and a wrapper that reads each model once and calls it in batches.

Models run in half precision on a GPU and single on a CPU; similarities and heads always in single precision.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from d3po_core.devices import device_type
from d3po_core.errors import D3POError
from d3po_core.models.weights import expect_finite
from d3po_core.scorers.sources import Source

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Model:
    """A learned scorer's files.

    Attributes:
        default: hub id or folder of the weights if the configuration names none; empty if there is no default.
        rest: hub id for files that the weights' location may lack.
        files: the names of the files other than weights.
        read: builds the model on the CPU in a dtype; the model returns scores ``[B]`` of images and prompts.
    """

    default: str
    rest: str
    files: tuple[str, ...]
    read: "Callable[[Source, torch.dtype], torch.nn.Module]"


def _clip(name: str, **options: Any) -> "Callable[[Source, torch.dtype], torch.nn.Module]":
    """Return a reader that imports ``clip.py`` only when called, since its libraries take seconds to import."""

    def read(source: Source, dtype: "torch.dtype") -> "torch.nn.Module":
        from d3po_core.scorers import clip

        return getattr(clip, name)(source, dtype, **options)

    return read


def _image_reward(source: Source, dtype: "torch.dtype") -> "torch.nn.Module":
    from d3po_core.scorers.image_reward import ImageReward

    return ImageReward(source, dtype)


_CLIP_FILES = ("config.json", "preprocessor_config.json", "tokenizer_config.json")
_CLIP_L, _CLIP_H = "openai/clip-vit-large-patch14", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

MODELS: dict[str, Model] = {
    "aesthetic": Model("ttj/sac-logos-ava1-l14-linearMSE", _CLIP_L, ("preprocessor_config.json",), _clip("Aesthetic")),
    "clip_score": Model(_CLIP_L, _CLIP_L, _CLIP_FILES, _clip("Similarity", scale=100.0)),
    "pickscore": Model("yuvalkirstain/PickScore_v1", _CLIP_H, _CLIP_FILES, _clip("Similarity", scale=None)),
    "hpsv2": Model("adams-story/HPSv2-hf", _CLIP_H, _CLIP_FILES, _clip("Similarity", scale=1.0)),
    "image_reward": Model("", "google-bert/bert-base-uncased", ("tokenizer_config.json",), _image_reward),
}


def source_of(name: str, where: str) -> Source:
    """Return the locations of a learned scorer's files; nothing is read or downloaded.

    Raises:
        D3POError: there is no such folder, or no location at all.
    """
    if not where:
        raise D3POError(
            f"scorer {name!r}: its authors publish no safetensors; set scoring.models.{name} to a folder with the "
            "converted weights (docs/scorers.md says how)"
        )
    return Source(name, where, MODELS[name].rest)


class ModelScorer:
    """A learned scorer: it finds its files at once and reads its weights at the first call.

    Between calls the weights stay on the device, or wait in main memory if ``leaves_device``.
    """

    def __init__(self, name: str, where: str, device: str, batch_size: int, leaves_device: bool) -> None:
        from d3po_core.speed.row_limit import RowLimit

        self.name, self._batch_size = name, batch_size
        self._source = source_of(name, where)
        self._source.weights()
        for filename in MODELS[name].files:
            self._source.place_of(filename)
        self._device, self._leaves_device = device_type(device), leaves_device
        self._rows = RowLimit(f"scorer {name!r}", remedy="A lower scoring.batch_size")
        self._judge: torch.nn.Module | None = None

    def __call__(self, images: np.ndarray, prompts: list[str]) -> np.ndarray:
        """Return scores ``[B]`` of images ``[B, height, width, 3]``."""
        if self._judge is None:
            self._judge = _read(self.name, self._source, half_precision=self._device == "cuda")
        with self._on_device(self._judge):
            return self._rows.fit(self._batch_size, partial(self._score, self._judge, images, prompts))

    @contextlib.contextmanager
    def _on_device(self, judge: "torch.nn.Module") -> Iterator[None]:
        judge.to(self._device)
        try:
            yield
        finally:
            if self._leaves_device:
                judge.to("cpu")

    def _score(self, judge: "torch.nn.Module", images: np.ndarray, prompts: list[str], rows: int) -> np.ndarray:
        import torch

        with torch.inference_mode():
            parts = [
                judge(images[start : start + rows], prompts[start : start + rows]).cpu()
                for start in range(0, len(images), rows)
            ]
        return torch.cat(parts).double().numpy() if parts else np.empty(0)


def _read(name: str, source: Source, half_precision: bool) -> "torch.nn.Module":
    """Load the model on the CPU; it returns scores ``[B]`` of images and prompts."""
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    with source.explained():
        judge = MODELS[name].read(source, torch.float16 if half_precision else torch.float32)
    expect_finite(judge, f"scorer {name!r}: {source.where}")
    return judge
