"""Load a text encoder, and refuse missing weights, which the library would draw at random."""

from pathlib import Path
from typing import Any

import torch
import transformers

from d3po_core.config import ModelConfig
from d3po_core.models.model_files import weight_files
from d3po_core.models.tensor_files import read_weights, stored_in_8_bits


def text_encoder(config: ModelConfig, folder: Path, kind: str, dtype: torch.dtype) -> Any:
    """Return a text encoder from its own folder, computed in ``dtype``.

    Raises:
        ValueError: weights are missing or of another shape.
    """
    whose, files = f"model.path {config.path!r}", weight_files(config, folder.parent, folder.name)
    if stored_in_8_bits(whose, files):
        return text_encoder_of(read_weights(whose, files, dtype), folder, kind, dtype)
    has_variant = config.variant and any(folder.glob(f"*.{config.variant}*safetensors"))
    return _whole(folder, kind, dtype, folder, variant=config.variant if has_variant else None, use_safetensors=True,
                  local_files_only=True)  # fmt: skip


def text_encoder_of(state: dict[str, torch.Tensor], folder: Path, kind: str, dtype: torch.dtype) -> Any:
    """Return a text encoder with these weights, as the folder's configuration describes it; ValueError as above."""
    described = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    return _whole(None, kind, dtype, folder, config=described, state_dict=state)


def _whole(source: Path | None, kind: str, dtype: torch.dtype, folder: Path, **options: Any) -> Any:
    encoder, found = getattr(transformers, kind).from_pretrained(
        source, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    wrong = sorted({*found["missing_keys"], *(str(key[0]) for key in found["mismatched_keys"])})
    if wrong:
        raise ValueError(f"{folder.name}: {len(wrong)} weights are missing or of another shape, such as {wrong[0]}")
    return encoder
