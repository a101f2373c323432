"""Cards and configurations for exported folders, without paths of this machine."""

from pathlib import Path
from typing import Any

import yaml

from d3po_core.config import CampaignConfig, is_url
from d3po_core.paths import resolve_path
from d3po_core.urls import masked


def card(header: dict[str, Any], body: str) -> str:
    """Return a Markdown README with a YAML header, as the Hugging Face hub reads it."""
    return f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---\n\n{body.strip()}\n"


def public_config(config: CampaignConfig) -> dict[str, Any]:
    """Return a configuration to publish: no ``runs_dir``, and only the last part of paths outside the project."""
    values = config.model_dump(mode="json", exclude={"runs_dir"})
    places = [*(("model", field) for field in ("path", "single_file_config", "start_from")),
              ("sample", "prompts"), ("evaluate", "prompts")]  # fmt: skip
    for holder, key in [
        *((values[section], field) for section, field in places),
        *((values["scoring"]["models"], name) for name in values["scoring"]["models"]),
    ]:
        if is_url(holder[key] or ""):
            holder[key] = masked(holder[key])
        path = Path(holder[key] or "")
        if path.is_absolute() or str(path).startswith(("~", "..")):
            holder[key] = path.name
    return values


def hub_model(config: CampaignConfig) -> str | None:
    """Return the base model's hub id; None if the base model is a folder."""
    return None if resolve_path(config.model.path).exists() else config.model.path
