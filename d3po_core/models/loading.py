"""Load a base model from a diffusers folder, a hub id, or one merged file with its original configuration."""

from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from d3po_core.config import ModelConfig
from d3po_core.errors import D3POError
from d3po_core.models.families import Family
from d3po_core.models.model_files import chain, check_folder, family_named, tensor_shapes
from d3po_core.models.places import check_path, model_folder
from d3po_core.models.weights import expect_finite
from d3po_core.paths import resolve_path

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def load_family(config: ModelConfig) -> Family:
    """Load the base model on the CPU, in its compute precision.

    Raises:
        D3POError: the model is missing or unreadable; the message is one line and says what to do.
    """
    check_model(config)
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    try:
        pipeline, family = _loaded(config)
        _expect_all_weights(pipeline)
        for name, part in _modules(pipeline):
            expect_finite(part, f"model.path {config.path!r}: {name}")
    except D3POError:
        raise
    except Exception as error:  # libraries raise anything on malformed files
        hint = ("; is the hub id right, and the network or the hub's cache there? A gated model also wants its licence "
                "accepted on its page, and `hf auth login`. A folder works too")  # fmt: skip
        if resolve_path(config.path).exists():
            hint = "; is it a whole model, made from model.single_file_config?" if config.single_file_config else ""
        raise D3POError(f"model.path {config.path!r}: cannot be loaded ({_reason(error)}){hint}") from None
    scheduler = {**pipeline.scheduler.config, "_class_name": type(pipeline.scheduler).__name__}
    pipeline.scheduler = chain(config, scheduler, family)
    if config.precision == "fp16" and pipeline.vae.config.get("force_upcast"):
        pipeline.vae.to(torch.float32)  # such a VAE overflows in fp16
    return family(pipeline)


def _loaded(config: ModelConfig) -> tuple[Any, type[Family]]:
    path, dtype = resolve_path(config.path), DTYPES[config.precision]
    if config.single_file_config:
        described_by = _local(config.single_file_config)
        index = DiffusionPipeline.load_config(described_by, revision=config.revision)
        family = family_named(config, index.get("_class_name"))
        source = str(path) if path.exists() else config.path
        options = _left_out(family, index)
        return family.PIPELINE.from_single_file(source, config=described_by, torch_dtype=dtype, **options), family
    if path.exists():
        folder = path
    else:
        index = DiffusionPipeline.load_config(config.path, revision=config.revision)
        family = family_named(config, index.get("_class_name"))
        folder = Path(DiffusionPipeline.download(
            config.path, revision=config.revision, variant=config.variant, use_safetensors=True,
            **_left_out(family, index),
        ))  # fmt: skip
        check_folder(config, folder)
    index = DiffusionPipeline.load_config(str(folder))
    family = family_named(config, index.get("_class_name"))
    encoders = {name: _text_encoder(config, folder / name, index[name][1], dtype)
                for name in family.TEXT_PARTS if index.get(name, [None])[0] is not None}  # fmt: skip
    options = _left_out(family, index) | encoders
    return family.PIPELINE.from_pretrained(
        str(folder), variant=config.variant, dtype=dtype, use_safetensors=True, **options
    ), family


def _left_out(family: type[Family], index: dict[str, Any]) -> dict[str, Any]:
    """Return the parts to pass as absent: those the folder was saved without, and unwanted ones."""
    absent = [name for name, part in index.items() if isinstance(part, list | tuple) and part[0] is None]
    return dict.fromkeys(absent) | family.LEFT_OUT


def _text_encoder(config: ModelConfig, folder: Path, kind: str, dtype: torch.dtype) -> Any:
    """Load a text encoder and refuse missing weights, which the library would draw at random."""
    has_variant = config.variant and any(folder.glob(f"*.{config.variant}*safetensors"))
    encoder, found = getattr(transformers, kind).from_pretrained(
        folder, dtype=dtype, variant=config.variant if has_variant else None, use_safetensors=True,
        local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True,
    )  # fmt: skip
    wrong = sorted({*found["missing_keys"], *(str(key[0]) for key in found["mismatched_keys"])})
    if wrong:
        raise ValueError(f"{folder.name}: {len(wrong)} weights are missing or of another shape, such as {wrong[0]}")
    return encoder


def check_model(config: ModelConfig) -> None:
    """Check a model's files without loading it, so that a broken one fails before any work.

    Raises:
        D3POError: the folder lacks a pipeline part, or the configured CUDA device is absent.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise D3POError("model.device is 'cuda' but no CUDA device is visible; use 'auto' or 'cpu'")
    check_path(config)
    path = resolve_path(config.path)
    if not path.exists():
        return
    if path.is_file():
        _check_single_file(config, path)
    folder = model_folder(config)
    if folder is not None:
        check_folder(config, folder, with_weights=not path.is_file())


def _check_single_file(config: ModelConfig, path: Path) -> None:
    if path.suffix != ".safetensors":
        raise D3POError(
            f"model.path {config.path!r}: is a {path.suffix or 'nameless'} file; expected .safetensors, which runs "
            "no code when it is read: convert it first"
        )
    if not config.single_file_config:
        raise D3POError(
            f"model.path {config.path!r}: is one file; set model.single_file_config to the folder or hub id of the "
            "model that it was made from, whose configuration and tokenizer are needed"
        )
    tensor_shapes(config, path)


def _local(path: str) -> str:
    local = resolve_path(path)
    return str(local) if local.exists() else path


def _modules(pipeline: Any) -> list[tuple[str, torch.nn.Module]]:
    return [(name, part) for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)]


def _expect_all_weights(pipeline: Any) -> None:
    """Check that no part lacks weights, which the library silently leaves without values."""
    missing = [f"{name}.{key}" for name, part in _modules(pipeline)
               for key, value in (*part.named_parameters(), *part.named_buffers()) if value.is_meta]  # fmt: skip
    if missing:
        raise ValueError(f"{len(missing)} weights are missing, such as {missing[0]}")


def _reason(error: Exception) -> str:
    if isinstance(error, NotImplementedError):  # torch raises this for a weight without a value
        return "weights are missing"
    return " ".join(str(error).split())[:300] or type(error).__name__
