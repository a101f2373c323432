"""Configurations from nested values: read, merge and compare them."""

from typing import Any

from pydantic import ValidationError

from d3po_core.config import CampaignConfig
from d3po_core.errors import D3POError


def load_config(values: dict[str, Any], source: str) -> CampaignConfig:
    """Return the configuration made from values, after validation.

    Args:
        values: nested mapping; a key that is not a field is an error that names the nearest field.
        source: the values' origin, for the message.

    Raises:
        D3POError: one line that lists every wrong field.
    """
    try:
        return CampaignConfig.model_validate(values)
    except ValidationError as error:
        raise D3POError(f"{source}: {'; '.join(_explain(problem) for problem in error.errors())}") from None


def _explain(problem: Any) -> str:
    import difflib

    # A field of several types has one problem per type; drop the types' names from the field's path.
    kinds = ("int", "literal[")
    parts = [str(part) for part in problem["loc"] if not isinstance(part, int)]
    path = ".".join(part for part in parts if not part.startswith(kinds)) or "config"
    if problem["type"] != "extra_forbidden":
        message = problem["msg"].removeprefix("Value error, ")
        return f"{path} is {problem['input']!r}: {message}" if problem["type"] != "value_error" else message
    section: Any = CampaignConfig
    for part in problem["loc"][:-1]:
        section = section.model_fields[str(part)].annotation
    near = difflib.get_close_matches(str(problem["loc"][-1]), section.model_fields, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"expected one of {', '.join(section.model_fields)}"
    return f"{path} is not a field; {hint}"


def merge(base: dict[str, Any], override: dict[str, Any]) -> dict[str, Any]:
    """Return the two nested mappings merged; the override's leaves win."""
    merged = dict(base)
    for key, value in override.items():
        inner = merged.get(key)
        merged[key] = merge(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged


def leaves(value: Any, path: str = "") -> dict[str, Any]:
    """Return the values within nested mappings by dotted name, in order; an empty mapping has none."""
    if not isinstance(value, dict):
        return {path: value}
    return {k: v for key, inner in value.items() for k, v in leaves(inner, f"{path}.{key}".lstrip(".")).items()}


def changed_fields(old: CampaignConfig, new: CampaignConfig) -> list[tuple[str, Any, Any]]:
    """Return the dotted names of changed fields with old and new value; each entry of a mapping is a field."""
    before, after = leaves(old.model_dump(mode="json")), leaves(new.model_dump(mode="json"))
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    return [(name, before.get(name), after.get(name)) for name in names]
