"""What a run must download from the hub: the model, and learned scorers, unless they are whole on this machine."""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from d3po_core.config import CampaignConfig, ModelConfig, is_url
from d3po_core.errors import D3POError
from d3po_core.machine.hub import hub_files
from d3po_core.models.places import INDEX, cached_folder, start_place
from d3po_core.paths import resolve_path
from d3po_core.planning.model_facts import WEIGHTS, read_json
from d3po_core.scorers.models import MODELS, source_of
from d3po_core.scorers.sources import WEIGHTS as SCORERS_WEIGHTS

PARTS_WITH_WEIGHTS = ("unet", "transformer", "vae", "text_encoder")


@dataclass(frozen=True)
class Download:
    """A hub id to download.

    Attributes:
        field: the configuration field that names it.
        hub_id: the id.
        revision: its revision; the newest if None.
        variant: the variant of a pipeline's weights.
        pipeline: whether it is a pipeline, or one learned scorer or LoRA.
    """

    field: str
    hub_id: str
    revision: str | None = None
    variant: str | None = None
    pipeline: bool = True


def missing_downloads(config: CampaignConfig) -> list[Download]:
    """Return what is not whole on this machine; paths and scorers that are wrong are left to their own checks."""
    model = config.model
    places = [("model.path", model.path), ("model.single_file_config", model.single_file_config)]
    found = [
        Download(field, name, model.revision, model.variant)
        for field, name in places
        if name and name.count("/") == 1 and not name.startswith((".", "/", "~")) and not resolve_path(name).exists()
        if not _is_whole(cached_folder(name, model.revision), model)
    ]
    start = model.start_from
    if start and start.count("/") and not start.startswith((".", "/", "~")) and start_place(model) is None:
        found.append(Download("model.start_from", "/".join(start.split("/")[:2]), pipeline=False))
    for scorer in dict.fromkeys((*config.judge.scorers, *config.evaluation_scorers)):
        where = config.scoring.models.get(scorer, MODELS[scorer].default if scorer in MODELS else "")
        if scorer in MODELS and not is_url(where) and _scorer_is_missing(scorer, where):
            found.append(Download(f"scoring.models.{scorer}", where, pipeline=False))
    return found


def _is_whole(folder: Path | None, config: ModelConfig) -> bool:
    """Return whether every part of a cached model has weights; a download may have been cut off."""
    if folder is None:
        return False
    if config.single_file_config:
        return True
    index = read_json(config, folder / INDEX)
    parts = [name for name, entry in index.items() if name.startswith(PARTS_WITH_WEIGHTS) and entry != [None, None]]
    return all(_has_weights(folder / part, config.variant) for part in parts)


def _has_weights(part: Path, variant: str | None) -> bool:
    """Return whether a part has weights; further text encoders may lack the variant."""
    strict = variant and part.name in PARTS_WITH_WEIGHTS
    found = list(part.glob(f"*.{variant}*safetensors" if strict else WEIGHTS))
    return bool(found) and all(file.exists() for file in found)  # a link to a file that never came does not exist


def _scorer_is_missing(scorer: str, where: str) -> bool:
    try:
        hub_id = source_of(scorer, where).where
    except D3POError:
        return False
    names = (SCORERS_WEIGHTS, f"{SCORERS_WEIGHTS}.index.json")
    if Path(hub_id).is_dir():
        return False
    return not any(isinstance(try_to_load_from_cache(hub_id, name), str) for name in names)


def files_of(download: Download) -> dict[str, int]:
    """Return a download's files on the hub with their bytes; D3POError if the hub does not answer or refuses."""
    return hub_files(download.hub_id, download.revision, download.field)


def download_bytes(download: Download, files: dict[str, int]) -> int:
    """Return how many bytes of a hub model's files are needed.

    A pipeline's part with weights of the variant takes those, any other its plain ones. The safety checker is left out.
    """
    parts: dict[str, dict[str, int]] = {}
    for name, count in files.items():
        folder, _, file = name.rpartition("/")
        if download.pipeline == bool(folder) and "/" not in folder and folder != "safety_checker":
            parts.setdefault(folder, {})[file] = count
    return sum(_part_bytes(part, download.variant) for part in parts.values())


def _part_bytes(part: dict[str, int], variant: str | None) -> int:
    weights = {name: size for name, size in part.items() if name.endswith(".safetensors")}
    of_variant = {name: size for name, size in weights.items() if variant and f".{variant}" in name}
    plain = {name: size for name, size in weights.items() if "." not in name.removesuffix(".safetensors")}
    small = {name: size for name, size in part.items() if name.endswith((".json", ".txt", ".model"))}
    return sum((of_variant or plain).values()) + sum(small.values())
