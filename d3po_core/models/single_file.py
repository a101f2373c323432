"""Load one file of weights: a whole merged model, or a network alone beside the folder with the other parts."""

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.loaders.single_file import load_single_file_sub_model
from huggingface_hub import snapshot_download

from d3po_core.config import ModelConfig
from d3po_core.errors import D3POError
from d3po_core.models.families import Family
from d3po_core.models.tensor_files import read_weights, stored_in_8_bits, tensors_of
from d3po_core.models.text_weights import text_encoder_of
from d3po_core.paths import resolve_path

NETWORK = "model.diffusion_model."
VAE = ("first_stage_model.", "vae.")
CLIP = ("cond_stage_model.", "conditioner.", "text_encoders.clip_")
T5 = "text_encoders.t5xxl.transformer."
TEXT = ("cond_stage_model.", "conditioner.", "text_encoders.")
# Tensors that diffusers' networks make themselves, or no longer have.
UNUSED = ("pos_embed", "y_embedder.y_embedding", "norm_final.weight")


def check_single_file(config: ModelConfig, path: Path) -> None:
    """Check that a file can be one model's weights; D3POError with one line if not."""
    whose = f"model.path {config.path!r}"
    if path.suffix != ".safetensors":
        raise D3POError(
            f"{whose}: is a {path.suffix or 'nameless'} file; expected .safetensors, which runs no code when it is "
            "read: convert it first"
        )
    if not config.single_file_config:
        raise D3POError(
            f"{whose}: is one file; set model.single_file_config to the folder or hub id of the model that it was made "
            "from, whose configuration and tokenizer are needed"
        )
    names = tensors_of(whose, path)
    if any("lora" in name for name in names):
        raise D3POError(f"{whose}: is a LoRA; name it as model.start_from, and the model that it was trained on as "
                        "model.path")  # fmt: skip
    stored_in_8_bits(whose, [path])


def parts_held(config: ModelConfig, path: Path, family: type[Family], index: dict[str, Any]) -> list[str]:
    """Return the parts whose weights one file holds: the network at least.

    Raises:
        D3POError: it holds a text encoder that cannot be read from there.
    """
    names = tensors_of(f"model.path {config.path!r}", path)
    held = [family.NETWORK]
    if _any_below(names, VAE):
        held.append("vae")
    for part in family.TEXT_PARTS:
        kind = str((index.get(part) or [None, None])[1])
        if _any_below(names, CLIP if kind.startswith("CLIP") else (T5,) if kind.startswith("T5") else ()):
            held.append(part)
    if _any_below(names, TEXT) and not set(held) & set(family.TEXT_PARTS):
        raise D3POError(
            f"model.path {config.path!r}: the file holds a text encoder that cannot be read from there; take a file of "
            f"the {family.NETWORK} alone, and the rest from model.single_file_config"
        )
    return held


def load_parts(
    config: ModelConfig, path: Path, folder: Path, family: type[Family], index: dict[str, Any], dtype: torch.dtype
) -> dict[str, Any]:
    """Return the parts that one file holds, loaded as the folder's configurations describe them.

    Raises:
        ValueError: the file has weights that the network does not have.
    """
    state = read_weights(f"model.path {config.path!r}", [path], dtype)
    inner = any(name.startswith(NETWORK) for name in state)
    network = {name: value for name, value in state.items()
               if (name.startswith(NETWORK) if inner else not name.startswith((*VAE, *TEXT)))}  # fmt: skip
    if family.NETWORK != "unet":  # not all of the library's readers know the prefix
        network = {name.removeprefix(NETWORK): value for name, value in network.items()}
    loaded = {}
    for part in parts_held(config, path, family, index):
        library, kind = index[part]
        if kind.startswith("T5"):
            t5 = {name.removeprefix(T5): value for name, value in state.items() if name.startswith(T5)}
            loaded[part] = text_encoder_of(t5, folder / part, kind, dtype)
            continue
        loaded[part] = load_single_file_sub_model(
            library, kind, part, dict(network if part == family.NETWORK else state), None, False, str(folder),
            torch_dtype=dtype, local_files_only=True,
        )  # fmt: skip
    _expect_all_used(network, loaded[family.NETWORK], path)
    return loaded


def load_in_8_bits(
    config: ModelConfig, files: list[Path], folder: Path, part: str, kind: str, dtype: torch.dtype
) -> Any:
    """Return a network of a folder whose weights are stored in 8 bits, with its scales applied."""
    state = read_weights(f"model.path {config.path!r}", files, dtype)
    network = getattr(diffusers, kind).from_single_file(
        dict(state), config=str(folder), subfolder=part, torch_dtype=dtype, local_files_only=True
    )
    _expect_all_used(state, network, folder / part)
    return network


def described_by(config: ModelConfig, held: Collection[str] = ()) -> Path:
    """Return the folder of ``model.single_file_config``; from the hub, without the weights of the parts ``held``."""
    place = str(config.single_file_config)
    folder = resolve_path(place)
    if folder.exists():
        return folder
    texts = ["*.json", "*.txt", "**/*.json", "**/*.txt", "**/*.model"]
    if not held:
        return Path(snapshot_download(place, revision=config.revision, allow_patterns=texts))
    of_variant = f"*.{config.variant}*.safetensors" if config.variant else "*.safetensors"
    parts = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3")
    weights = [f"{part}/{of_variant}" for part in parts if part not in held]
    others = [] if config.variant else ["*.fp16*", "*.bf16*"]
    return Path(snapshot_download(
        place, revision=config.revision, allow_patterns=texts + weights, ignore_patterns=others
    ))  # fmt: skip


def _any_below(names: Iterable[str], prefixes: tuple[str, ...]) -> bool:
    return any(name.startswith(prefixes) for name in names)


def _expect_all_used(state: dict[str, torch.Tensor], network: torch.nn.Module, path: Path) -> None:
    """Check that a network took all weights, of which the library drops those that it does not know."""
    given = {name.removeprefix(NETWORK): value.numel() for name, value in state.items()}
    total = sum(numbers for name, numbers in given.items() if name not in UNUSED)
    own = sum(value.numel() for name, value in network.state_dict().items() if name not in UNUSED)
    if total > own:
        raise ValueError(
            f"{path.name} has {total - own} more numbers than a {type(network).__name__} of that configuration"
        )
