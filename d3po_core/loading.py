"""Loading a base model: a diffusers folder, a hub id, or one merged file with the configuration it was made with."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import SingleFileComponentError
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from d3po_core.config import ModelConfig, resolve_path
from d3po_core.errors import D3POError
from d3po_core.families import FAMILIES, Family

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Not wanted, and absent from many folders: these would be loaded, or missed, for nothing.
_LEFT_OUT: dict[str, dict[str, Any]] = {
    "StableDiffusionPipeline": {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
}


def load_family(config: ModelConfig) -> Family:
    """The base model, on the CPU, in the precision that it computes in.

    Raises:
        D3POError: no such model, or it cannot be read; one line that says what to do.
    """
    check_model(config)
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()
    path = resolve_path(config.path)
    source = str(path) if path.exists() else config.path
    dtype = DTYPES[config.precision]
    try:
        described_by = _local(config.single_file_config) if config.single_file_config else source
        index = DiffusionPipeline.load_config(described_by, revision=config.revision)
        family = _family(config, index.get("_class_name"))
        # Parts that a folder was saved without have to be named; SD3 without its third encoder is one such.
        absent = [name for name, part in index.items() if isinstance(part, list | tuple) and part[0] is None]
        options: dict[str, Any] = dict.fromkeys(absent) | _LEFT_OUT.get(family.PIPELINE.__name__, {})
        if config.single_file_config:
            pipeline = family.PIPELINE.from_single_file(source, config=described_by, torch_dtype=dtype, **options)
            _expect_all_weights(pipeline)
        else:
            pipeline = family.PIPELINE.from_pretrained(
                source, revision=config.revision, variant=config.variant, dtype=dtype, use_safetensors=True, **options
            )
    except (OSError, ValueError, SafetensorError, RuntimeError, KeyError, SingleFileComponentError) as error:
        if isinstance(error, D3POError):
            raise
        hint = "; is the hub id right, and the network or the hub's cache there? A folder works too"
        if path.exists():
            hint = "; is it a whole model, made from model.single_file_config?" if config.single_file_config else ""
        raise D3POError(f"model.path {config.path!r}: cannot be loaded ({_reason(error)}){hint}") from None
    if config.precision == "fp16" and pipeline.vae.config.get("force_upcast"):
        pipeline.vae.to(torch.float32)  # such a VAE overflows in fp16
    return family(pipeline)


def check_model(config: ModelConfig) -> None:
    """Look at a model folder without loading it, so that a wrong one is known before any work.

    Raises:
        D3POError: the folder lacks a part of a pipeline, or a CUDA device is asked for and absent.
    """
    if config.device == "cuda" and not torch.cuda.is_available():
        raise D3POError("model.device is 'cuda' but no CUDA device is visible; use 'auto' or 'cpu'")
    path = resolve_path(config.path)
    if not path.exists():
        looks_local = config.path.startswith((".", "/", "~")) or config.path.count("/") != 1
        if looks_local:
            raise D3POError(
                f"model.path {config.path!r}: no such folder ({path}); expected a diffusers pipeline or hub id"
            )
        return
    if path.is_file():
        _check_single_file(config, path)
        return
    index = path / "model_index.json"
    if not index.is_file():
        raise D3POError(f"model.path {config.path!r}: {index.name} is missing; expected a diffusers pipeline folder")
    try:
        content = json.loads(index.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise D3POError(
            f"model.path {config.path!r}: {index.name} is not JSON ({error}); copy the folder again"
        ) from None
    name = content.get("_class_name") if isinstance(content, dict) else None
    family = _family(config, name)
    weights = f"*.{config.variant}*safetensors" if config.variant else "*.safetensors"
    parts = dict.fromkeys((family.NETWORK, "vae", "text_encoder"), weights) | {"tokenizer": "*.json"}
    for part, pattern in parts.items():
        if not list((path / part).glob(pattern)):
            raise D3POError(
                f"model.path {config.path!r}: {part}/{pattern} is missing; expected a whole pipeline folder, "
                "written by pipe.save_pretrained"
            )


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


def _family(config: ModelConfig, name: Any) -> type[Family]:
    if name not in FAMILIES:
        raise D3POError(f"model.path {config.path!r}: is a {name}; expected one of {', '.join(FAMILIES)}")
    return FAMILIES[name]


def _local(path: str) -> str:
    local = resolve_path(path)
    return str(local) if local.exists() else path


def _expect_all_weights(pipeline: Any) -> None:
    """Make sure that no part lacks weights, which the library leaves without values and says nothing."""
    modules = [(name, part) for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)]
    missing = [f"{name}.{key}" for name, part in modules for key, value in part.named_parameters() if value.is_meta]
    if missing:
        raise ValueError(f"{len(missing)} weights are missing, such as {missing[0]}")


def _reason(error: Exception) -> str:
    if isinstance(error, NotImplementedError):  # torch's word for a weight that has no value
        return "weights are missing"
    return " ".join(str(error).split())[:300] or type(error).__name__
