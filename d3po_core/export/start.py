"""The lines of an export about the LoRA that its campaign went on from."""

from pathlib import Path
from typing import Any

from d3po_core.config import CampaignConfig
from d3po_core.export.cards import public_config
from d3po_core.models.families import Family
from d3po_core.models.weights import merging_lines
from d3po_core.reproducing.frozen import FROZEN_FILE, START
from d3po_core.store.integrity import RESTORE
from d3po_core.store.sealed import read_sealed


def said_of_start(campaign: Path, config: CampaignConfig, part: str) -> str:
    """Return a model card's paragraph; empty if the campaign began with the base model.

    Args:
        campaign: the campaign's folder.
        config: the round's configuration.
        part: what is exported: ``LoRA``, or the network's name.
    """
    if _shown(config) is None:
        return ""
    digests = [sha256 for files in start_digests(campaign).values() for sha256 in files.values()]
    start = f"`{_shown(config)}`" + (f" (SHA-256 `{digests[0]}`)" if len(digests) == 1 else "")
    if config.model.start_as == "continue":
        return f"Training went on from the LoRA {start}, which this one contains: use this one alone.\n\n"
    if part != "LoRA":
        return f"The LoRA {start} was merged into the base model first; these weights contain it.\n\n"
    return (
        f"The LoRA {start} was merged into the base model first, and this one holds only what was learned on top: "
        "use both, each at strength 1. The lines above merge the first. In ComfyUI, chain two LoRA loaders; in "
        "AUTOMATIC1111, name both in the prompt.\n\n"
    )


def merging(config: CampaignConfig, family: type[Family]) -> str:
    """Return lines of Python that merge the start into ``pipe``; empty if the exported weights need none."""
    return "".join(f"\n{line}" for line in merging_lines(config.model, family.NETWORK, _shown(config)))


def start_digests(campaign: Path) -> dict[str, Any]:
    """Return the digests of the start's files, for the exported configuration; empty if there is no start."""
    path = campaign / FROZEN_FILE
    files = (read_sealed(path, RESTORE).get("files") or {}) if path.is_file() else {}
    found = {name.partition(": ")[2]: files[name][2] for name in files if name.startswith(f"{START}: ")}
    return {"start_sha256": found} if found else {}


def _shown(config: CampaignConfig) -> str | None:
    shown: str | None = public_config(config)["model"]["start_from"]
    return shown
