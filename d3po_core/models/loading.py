"""Load a base model from a diffusers folder, a hub id, or one merged file with its original configuration."""

from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from d3po_core.config import ModelConfig
from d3po_core.errors import D3POError
from d3po_core.models.families import Family
from d3po_core.models.model_files import chain, check_folder, family_named, family_of, index_of, weight_files
from d3po_core.models.places import check_path, model_folder, start_place
from d3po_core.models.single_file import check_single_file, described_by, load_in_8_bits, load_parts, parts_held
from d3po_core.models.start import check_start, merge_start
from d3po_core.models.tensor_files import stored_in_8_bits
from d3po_core.models.text_weights import text_encoder
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
        if config.start_as == "merge":
            merge_start(config, family(pipeline))
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
        if not path.is_file():
            raise D3POError(f"model.path {config.path!r}: is no file; leave out model.single_file_config, which "
                            "describes one .safetensors file")  # fmt: skip
        folder, family, index = _described(config, path)
        parts = load_parts(config, path, folder, family, index, dtype)
    else:
        folder = path if path.exists() else _downloaded(config)
        index = DiffusionPipeline.load_config(str(folder))
        family, parts = family_named(config, index.get("_class_name")), {}
    for name in family.TEXT_PARTS:
        if name not in parts and index.get(name, [None])[0] is not None:
            parts[name] = text_encoder(config, folder / name, index[name][1], dtype)
    for name in {family.NETWORK, "vae"} - parts.keys():
        files = weight_files(config, folder, name)
        if stored_in_8_bits(f"model.path {config.path!r}", files):
            parts[name] = load_in_8_bits(config, files, folder, name, index[name][1], dtype)
    rest = {family.NETWORK, "vae"} - parts.keys()
    return family.PIPELINE.from_pretrained(
        str(folder), variant=config.variant if rest else None, dtype=dtype, use_safetensors=True,
        **_left_out(family, index) | parts,
    ), family  # fmt: skip


def _described(config: ModelConfig, path: Path) -> tuple[Path, type[Family], dict[str, Any]]:
    """Return the folder that describes a file and has the parts that it lacks, its family and its index."""
    folder = described_by(config)
    index = DiffusionPipeline.load_config(str(folder))
    family = family_named(config, index.get("_class_name"))
    held = parts_held(config, path, family, index)
    folder = described_by(config, held)
    check_folder(config, folder, held=held)
    return folder, family, index


def _downloaded(config: ModelConfig) -> Path:
    """Download a hub model, and return its checked folder."""
    index = DiffusionPipeline.load_config(config.path, revision=config.revision)
    family = family_named(config, index.get("_class_name"))
    folder = Path(DiffusionPipeline.download(
        config.path, revision=config.revision, variant=config.variant, use_safetensors=True,
        **_left_out(family, index),
    ))  # fmt: skip
    check_folder(config, folder)
    return folder


def _left_out(family: type[Family], index: dict[str, Any]) -> dict[str, Any]:
    """Return the parts to pass as absent: those the folder was saved without, and unwanted ones."""
    absent = [name for name, part in index.items() if isinstance(part, list | tuple) and part[0] is None]
    return dict.fromkeys(absent) | family.LEFT_OUT


def check_model(config: ModelConfig) -> None:
    """Check a model's files without loading it, so that a broken one fails before any work.

    Raises:
        D3POError: the folder lacks a pipeline part, the LoRA to go on from does not fit, or the configured CUDA device
            is absent.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise D3POError("model.device is 'cuda' but no CUDA device is visible; use 'auto' or 'cpu'")
    check_path(config)
    start_place(config)
    path = resolve_path(config.path)
    if not path.exists():
        return
    if path.is_file():
        check_single_file(config, path)
    folder = model_folder(config)
    if folder is None:
        return
    family = _checked_folder(config, path, folder)
    if config.start_from:
        check_start(config, family, folder)


def _checked_folder(config: ModelConfig, path: Path, folder: Path) -> type[Family]:
    if not path.is_file():
        return check_folder(config, folder)
    held = parts_held(config, path, family_of(config, folder), index_of(config, folder))
    # What the hub's cache lacks comes with loading.
    return check_folder(config, folder, with_weights=resolve_path(str(config.single_file_config)).exists(), held=held)


def storage_notes(config: ModelConfig) -> list[str]:
    """Return one line per part of a model on this machine whose weights are stored in 8 bits."""
    path, folder = resolve_path(config.path), model_folder(config)
    if folder is None or not folder.is_dir():
        return []
    whose, index = f"model.path {config.path!r}", index_of(config, folder)
    stored = {part: stored_in_8_bits(whose, weight_files(config, folder, part))
              for part, entry in index.items() if isinstance(entry, list)}  # fmt: skip
    if path.is_file():
        held = parts_held(config, path, family_of(config, folder), index)
        stored = {part: how for part, how in stored.items() if part not in held} | {
            path.name: stored_in_8_bits(whose, [path])
        }
    computed = {"no": "single precision"}.get(config.precision, config.precision)
    return [f"{whose}: {what} is stored as {how} and computed in {computed}" for what, how in stored.items() if how]


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
