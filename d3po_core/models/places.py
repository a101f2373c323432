"""Find a model's description: in the user's own folder, in the hub's cache, or only on the hub."""

from pathlib import Path

from huggingface_hub import snapshot_download, try_to_load_from_cache

from d3po_core.config import ModelConfig
from d3po_core.errors import D3POError
from d3po_core.paths import resolve_path

INDEX = "model_index.json"


def model_folder(config: ModelConfig) -> Path | None:
    """Return the local folder that describes the model: the user's own or the hub's cached copy; else None."""
    described_by = config.single_file_config or config.path
    folder = resolve_path(described_by)
    if folder.exists():
        return folder
    return cached_folder(described_by, config.revision)


def cached_folder(hub_id: str, revision: str | None) -> Path | None:
    """Return the hub's cached copy of a model at a revision, if it is on this machine."""
    try:
        cached = try_to_load_from_cache(hub_id, INDEX, revision=revision)
    except ValueError:  # not a hub id
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def check_path(config: ModelConfig) -> None:
    """Check that a model's path exists, or can be a hub id.

    Raises:
        D3POError: it is neither.
    """
    path = resolve_path(config.path)
    looks_local = config.path.startswith((".", "/", "~")) or config.path.count("/") != 1
    if looks_local and not path.exists():
        raise D3POError(f"model.path {config.path!r}: no such folder ({path}); expected a diffusers pipeline or hub id")


def start_place(config: ModelConfig) -> Path | None:
    """Return where the LoRA to go on from lies: the user's own file or folder, or the hub's cached copy; else None.

    Raises:
        D3POError: ``model.start_from`` neither exists nor can be a hub id.
    """
    if not config.start_from:
        return None
    place = resolve_path(config.start_from)
    if place.exists():
        return place
    parts = config.start_from.split("/")
    if config.start_from.startswith((".", "/", "~")) or len(parts) < 2:
        raise D3POError(f"model.start_from {config.start_from!r}: no such file or folder ({place}); expected a LoRA's "
                        "folder, .safetensors file or hub id")  # fmt: skip
    try:
        folder = Path(snapshot_download("/".join(parts[:2]), local_files_only=True)).joinpath(*parts[2:])
    except (OSError, ValueError):  # not in the cache, or not a hub id
        return None
    return folder if folder.is_file() or next(folder.glob("*.safetensors"), None) else None
