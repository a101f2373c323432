"""Check a model folder's files before any weights are loaded; each problem is reported in one line."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
from pydantic import ValidationError

from d3po_core.config import CampaignConfig, ModelConfig
from d3po_core.errors import D3POError
from d3po_core.models.families import FAMILIES, Family, Network, Part, Vae
from d3po_core.models.places import INDEX, model_folder
from d3po_core.models.written import latent_at
from d3po_core.paths import resolve_path

# Real configurations take some kB and real weight headers some 100 kB; a larger file is something else.
MOST_JSON_BYTES, MOST_HEADER_BYTES = 4_000_000, 25_000_000


def check_folder(config: ModelConfig, folder: Path, with_weights: bool = True) -> type[Family]:
    """Check that a model folder's files fit each other, and return its family.

    Raises:
        D3POError: a file is absent, damaged or asks for something the family cannot do; one line.
    """
    family, index = family_of(config, folder), _read(config, folder, INDEX)
    for part in needed_parts(family, index):
        _check_entry(config, part, index.get(part))
    parts_of(config, folder, family)
    scheduler_of(config, folder, family)
    _check_settings(config, family)
    if with_weights:
        _check_weights(config, folder, family, index)
    return family


def _check_settings(config: ModelConfig, family: type[Family]) -> None:
    """Refuse settings that are not verified for a family, or that overflow."""
    name = family.PIPELINE.__name__
    if config.precision not in family.PRECISIONS:
        raise D3POError(
            f"model.precision is {config.precision!r}, in which a {name} overflows; expected "
            f"{' or '.join(map(repr, reversed(family.PRECISIONS)))}"
        )
    if config.compile and not family.REGIONS:
        raise D3POError(f"model.compile is not verified for a {name} yet; set it to false")


def family_of(config: ModelConfig, folder: Path) -> type[Family]:
    """Return the family that a folder's index names; D3POError if it is unreadable or names none of ours."""
    return family_named(config, _read(config, folder, INDEX).get("_class_name"))


def absent_parts(config: ModelConfig, folder: Path) -> list[str]:
    """Return the parts that a folder declares absent; loading must declare them too."""
    index = _read(config, folder, INDEX)
    return [name for name, entry in index.items() if entry == [None, None]]


def layers_per_block(config: ModelConfig) -> int:
    """Return the number of layers per UNet block; 2, as in every published UNet, if its configuration is absent."""
    folder = model_folder(config)
    found = _read(config, folder, "unet/config.json").get("layers_per_block") if folder else None
    return found if isinstance(found, int) else 2


def family_named(config: ModelConfig, name: Any) -> type[Family]:
    """Return the family whose pipeline has this class name; D3POError if there is none."""
    if not isinstance(name, str) or name not in FAMILIES:
        found = name if isinstance(name, str) else f"{json.dumps(name)[:60]} (in {INDEX})"
        raise D3POError(f"model.path {config.path!r}: is a {found}; expected one of {', '.join(FAMILIES)}")
    return FAMILIES[name]


def needed_parts(family: type[Family], index: dict[str, Any]) -> tuple[str, ...]:
    """Return the parts that a folder of this family must have; it may declare optional ones null."""
    absent = (None, [None, None])
    texts = [part for part in family.TEXT_PARTS if part not in family.OPTIONAL_PARTS or index.get(part) not in absent]
    tokenizers = [part.replace("text_encoder", "tokenizer") for part in texts]
    return (family.NETWORK, "vae", *texts, *tokenizers, "scheduler")


def parts_of(config: ModelConfig, folder: Path, family: type[Family]) -> dict[str, Part]:
    """Return the checked configurations of a folder's network and VAE, by part name.

    Raises:
        D3POError: one is missing, or asks for something the family cannot do.
    """
    return {
        part: _checked(config, part, kind, _read(config, folder, f"{part}/config.json"))
        for part, kind in family.PARTS.items()
    }


def scheduler_of(config: ModelConfig, folder: Path, family: type[Family]) -> Any:
    """Return the scheduler whose steps are trained, built from the folder's own scheduler.

    Raises:
        D3POError: its file is damaged, contradicts a merged file's marks, or asks for other steps.
    """
    content = _read(config, folder, "scheduler/scheduler_config.json")
    name = content.get("_class_name")
    try:
        # The class supplies fields that the file omits; the family refuses a class that diffusers lacks by name.
        known = getattr(diffusers, str(name), None)
        full = dict(known.from_config(content).config) | {"_class_name": name} if known else content
    except Exception as error:  # classes raise anything on values they do not know
        raise D3POError(
            f"model.path {config.path!r}: scheduler/scheduler_config.json: {name} cannot be made of it "
            f"({' '.join(str(error).split())[:200]})"
        ) from None
    return chain(config, full, family)


def chain(config: ModelConfig, scheduler: Mapping[str, Any], family: type[Family]) -> Any:
    """Build the family's scheduler from the model's own, a merged file's marks, and the configuration's fields.

    A field decides what files leave open or state differently, but must not contradict a file's own marks.

    Raises:
        D3POError: file, configuration and fields disagree, or the scheduler asks for other steps; one line.
    """
    prediction, zero_snr = config.prediction_type, config.zero_terminal_snr
    marked_prediction, marked_zero_snr = marks_of(config)
    described = (scheduler.get("prediction_type"), bool(scheduler.get("rescale_betas_zero_snr", False)))
    _agree(config, "prediction_type", marked_prediction, described[0], prediction)
    _agree(config, "zero_terminal_snr", marked_zero_snr, described[1], zero_snr)
    try:
        return family.chain(scheduler, prediction, zero_snr)
    except D3POError as error:
        raise D3POError(f"model.path {config.path!r}: {error}") from None


def _agree(config: ModelConfig, field: str, marked: Any, described: Any, given: Any) -> None:
    if marked is None or marked == (described if given is None else given):
        return
    other = f"single_file_config says {described!r}" if given is None else f"model.{field} is {given!r}"
    raise D3POError(
        f"model.path {config.path!r}: the file marks itself as {field} {marked!r}, but {other}; set model.{field} to "
        "what it was trained with, or name the configuration that it was made with"
    )


def marks_of(config: ModelConfig) -> tuple[str | None, bool | None]:
    """Return a merged file's own marks: its prediction type, and whether its last timestep is pure noise.

    Trainers leave empty tensors ``v_pred`` and ``ztsnr`` among the weights, or ``modelspec.prediction_type`` in the
    metadata (Stability AI's Model Metadata Standard). A missing mark gives None.
    """
    path = resolve_path(config.path)
    if not path.is_file():
        return None, None
    header = _header(config, path)
    metadata = header.get("__metadata__") or {}
    spec = {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
    prediction = "v_prediction" if "v_pred" in header else spec.get(str(metadata.get("modelspec.prediction_type")))
    return prediction, True if "ztsnr" in header else None


def with_model_defaults(config: CampaignConfig) -> CampaignConfig:
    """Return the configuration with the model's own step noise and LoRA layers if the user gave none.

    If the model's description is unavailable, the general default stays.
    """
    folder = model_folder(config.model)
    if folder is None or not (folder / INDEX).is_file():
        return config
    family = family_of(config.model, folder)
    if "lora_targets" not in config.model.model_fields_set and config.model.lora_targets != family.LORA_TARGETS:
        model = config.model.model_copy(update={"lora_targets": family.LORA_TARGETS})
        config = config.model_copy(update={"model": model})
    if "eta" in config.sample.model_fields_set:
        return config
    parts, scheduler = parts_of(config.model, folder, family), scheduler_of(config.model, folder, family)
    network, vae = parts[family.NETWORK], parts["vae"]
    assert isinstance(network, Network), "families say so"
    assert isinstance(vae, Vae), "families say so"
    native, per_side = network.latent_shape, vae.pixels_per_latent
    eta = min(  # one noise level for all sizes, which leaves no grain in any
        family.default_eta(config.sample.num_steps, scheduler, latent_at(native, per_side, size))
        for size in (*config.sample.image_sizes, config.held_out_size)
    )
    return config.model_copy(update={"sample": config.sample.model_copy(update={"eta": eta})})


def network_elements(config: ModelConfig) -> int | None:
    """Return the trained network's number of weights, or None if its files are absent."""
    folder = model_folder(config)
    if folder is None or not folder.is_dir():
        return None
    files = [path for part in ("unet", "transformer") for path in _weight_files(config, folder, part)]
    return sum(math.prod(shape) for path in files for shape in tensor_shapes(config, path).values()) or None


def tensor_shapes(config: ModelConfig, path: Path) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of a safetensors file's tensors, from its header alone.

    Raises:
        D3POError: the file is truncated, is not safetensors, or has an oversized header.
    """
    header = _header(config, path)
    return {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}


def _header(config: ModelConfig, path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            found = path.stat().st_size
            if not 2 <= size <= min(MOST_HEADER_BYTES, found - 8):
                raise ValueError(f"a header of {size} bytes in a file of {found}; at most {MOST_HEADER_BYTES}")
            header: dict[str, Any] = json.loads(file.read(size))
        entries = [entry for name, entry in header.items() if name != "__metadata__"]
        end = max((entry["data_offsets"][1] for entry in entries), default=0)
        if found != 8 + size + end or not all(isinstance(entry["shape"], list) for entry in entries):
            raise ValueError(f"{found} bytes; its header needs {8 + size + end}")
        return header
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        reason = str(error)[:200] if isinstance(error, OSError | ValueError) else "its header is damaged"
        raise D3POError(f"model.path {config.path!r}: {path.parent.name}/{path.name} is no whole safetensors file "
                        f"({reason}); copy it again") from None  # fmt: skip


def _read(config: ModelConfig, folder: Path, name: str) -> dict[str, Any]:
    """Read a folder's JSON file, which must hold a mapping."""
    path = folder / name
    if not path.is_file():
        raise D3POError(f"model.path {config.path!r}: {name} is missing; expected a diffusers pipeline folder, "
                        "written by pipe.save_pretrained")  # fmt: skip
    try:
        if path.stat().st_size > MOST_JSON_BYTES:
            raise ValueError(f"{path.stat().st_size} bytes")
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise D3POError(f"model.path {config.path!r}: {name} is not JSON ({error}); copy the folder again") from None
    if not isinstance(content, dict):
        raise D3POError(f"model.path {config.path!r}: {name} holds a {type(content).__name__}; expected a mapping")
    return content


def _named(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and all(isinstance(word, str) for word in entry)


def _check_entry(config: ModelConfig, part: str, entry: Any) -> None:
    if not _named(entry):
        raise D3POError(
            f"model.path {config.path!r}: {INDEX} says {json.dumps(entry)[:60]} of the part {part}; expected "
            '["library", "class"]: copy the folder again, or save the pipeline with all of its parts'
        )
    if entry[0] not in ("diffusers", "transformers"):
        raise D3POError(
            f"model.path {config.path!r}: {INDEX} takes {part} from {entry[0]!r}; expected diffusers or transformers: "
            "code that comes with a model is never run"
        )


def _checked(config: ModelConfig, part: str, kind: type[Part], content: dict[str, Any]) -> Part:
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        problem = error.errors()[0]
        field = str(problem["loc"][0]) if problem["loc"] else ""
        why = kind.WHY.get(field)
        said = f"{field} is {json.dumps(problem['input'])[:60]}: {why}, which cannot be trained here" if why else (
            f"{field}: {problem['msg']} (found {json.dumps(problem['input'])[:60]})" if field
            else problem["msg"].removeprefix("Value error, ")
        )  # fmt: skip
        raise D3POError(f"model.path {config.path!r}: {part}/config.json: {said}") from None


def _weight_files(config: ModelConfig, folder: Path, part: str) -> list[Path]:
    """Return a part's weight files: the variant's if it has any, else the plain ones."""
    files = sorted((folder / part).glob("*.safetensors"))
    variant = [path for path in files if config.variant and f".{config.variant}" in path.stem]
    return variant or [path for path in files if "." not in path.stem]


def _check_weights(config: ModelConfig, folder: Path, family: type[Family], index: dict[str, Any]) -> None:
    wanted = f"*.{config.variant}*safetensors" if config.variant else "*.safetensors"
    for part in needed_parts(family, index):
        if part.startswith("tokenizer"):
            pattern, there = "*.json", any((folder / part).glob("*.json"))
        elif part == "scheduler":
            pattern, there = "scheduler_config.json", (folder / part / "scheduler_config.json").is_file()
        else:
            files = _weight_files(config, folder, part)
            for path in files:
                tensor_shapes(config, path)
            # Other encoders may lack the variant; we then use their plain files, as the pipeline does.
            strict = config.variant and part in (family.NETWORK, "vae", "text_encoder")
            pattern = wanted
            there = any(f".{config.variant}" in path.stem for path in files) if strict else bool(files)
        if not there:
            raise D3POError(
                f"model.path {config.path!r}: {part}/{pattern} is missing; expected a whole pipeline folder, written "
                f"by pipe.save_pretrained{_instead(folder / part)}"
            )


def _instead(folder: Path) -> str:
    """Describe what a folder without safetensors holds instead."""
    pickled = next(iter(sorted(folder.glob("*.bin"))), None)
    if pickled is None:
        return ""
    return f" (it has {pickled.name}, which may run code when it is read: convert it to safetensors first)"
