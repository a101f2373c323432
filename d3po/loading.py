"""A round's checkpoint in a diffusers pipeline."""

import json
from pathlib import Path
from typing import Any

from d3po_core.errors import D3POError


def load_pipeline(campaign: Path, round_number: int, pipeline: Any = None) -> Any:
    """Return a pipeline with the round's LoRA, or with its trained network; round 0 is the base model.

    Args:
        campaign: the campaign's folder.
        round_number: a finished round.
        pipeline: the base model; None loads it as the round's configuration says. With ``model.start_as: merge`` it
            is the model that the LoRA of ``model.start_from`` was merged into.

    Raises:
        D3POError: the model cannot be loaded, or the checkpoint's file changed since training.
    """
    import diffusers

    from d3po_core.models.families import FAMILIES
    from d3po_core.models.loading import load_family
    from d3po_core.models.start import start_in_diffusers
    from d3po_core.models.weights import LORA_FILE, weights_file, weights_sha256
    from d3po_core.store.campaign import round_config
    from d3po_core.store.stages import checkpoint_path
    from d3po_core.store.tables import partition, read_rows

    config = round_config(campaign, round_number).model
    pipeline = pipeline or load_family(config).pipeline
    relative = checkpoint_path(round_number)
    if relative is None:
        if config.start_from and config.start_as == "continue":
            pipeline.load_lora_weights(start_in_diffusers(config, FAMILIES[type(pipeline).__name__](pipeline)))
        return pipeline
    folder = campaign / relative
    (row,) = read_rows(partition(campaign, "rounds", round_number) / "part.parquet")
    try:
        found = weights_sha256(folder)
    except OSError as error:
        raise D3POError(f"checkpoint {folder}: cannot be read ({error.strerror}); restore it from a copy") from None
    if found != row["lora_sha256"]:
        raise D3POError(f"checkpoint {folder}: its weights changed since training; restore them from a copy")
    file = weights_file(folder)
    if file.name == LORA_FILE:
        pipeline.load_lora_weights(folder, weight_name=LORA_FILE)
    else:
        part = file.parent.name
        kind = getattr(diffusers, json.loads((file.parent / "config.json").read_text())["_class_name"])
        network = kind.from_pretrained(folder, subfolder=part, local_files_only=True)
        setattr(pipeline, part, network.to(getattr(pipeline, part).dtype))
    return pipeline
