"""Configurations from nested values: read, merge and compare them."""

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from d3po_core.config import CampaignConfig
from d3po_core.errors import D3POError


def load_config(values: dict[str, Any], source: str, origins: Mapping[str, str] | None = None) -> CampaignConfig:
    """Return the configuration made from values, after validation.

    Args:
        values: nested mapping; a key that is not a field is an error that names the nearest field.
        source: the values' origin, for the message.
        origins: where single fields were typed, by dotted name, for the message.

    Raises:
        D3POError: one line that lists every wrong field.
    """
    try:
        return CampaignConfig.model_validate(values)
    except ValidationError as error:
        told = dict.fromkeys(_explain(problem, origins or {}) for problem in error.errors())
        raise D3POError(f"{source}: {'; '.join(told)}") from None


def field_names() -> dict[str, FieldInfo]:
    """Return the fields that hold a value, by dotted name, in order."""

    def within(section: type[BaseModel], path: str) -> Iterator[tuple[str, FieldInfo]]:
        for name, field in section.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                yield from within(field.annotation, f"{path}{name}.")
            else:
                yield f"{path}{name}", field

    return dict(within(CampaignConfig, ""))


# What a person should write, where pydantic names a Python type.
_WRITE = {
    "tuple_type": "write a list, such as [a, b]",
    "string_type": "write a text, in quotes if it looks like a number: '\"7\"'",
    "too_short": "give at least one",
    "dict_type": "write names with values, such as {name: value}",
    "model_type": "write its fields, such as {field: value}, or set one of them alone",
}


def _explain(problem: Any, origins: Mapping[str, str]) -> str:
    # A field of several types has one problem per type; drop the types' names from the field's path.
    kinds = ("int", "literal[")
    parts = [str(part) for part in problem["loc"] if not isinstance(part, int)]
    path = ".".join(part for part in parts if not part.startswith(kinds))
    origin = next((origins[name] for name in _and_sections_of(path) if name in origins), None)
    where, path = f"{origin}: " if origin else "", path or "config"
    if problem["type"] == "extra_forbidden":
        return f"{where}{path} is not a field; {_nearest(path)}"
    if problem["type"] == "value_error":
        return where + problem["msg"].removeprefix("Value error, ")
    expected = _WRITE.get(problem["type"]) or problem["msg"].replace("Input should be", "it must be")
    return f"{where}{path} is {problem['input']!r}: {expected}"


def _and_sections_of(path: str) -> Iterator[str]:
    while path:
        yield path
        path = path.rpartition(".")[0]


def _nearest(path: str) -> str:
    """Return which field a person may have meant, or else which ones there are."""
    section, _, name = path.rpartition(".")
    known = [*field_names(), *_sections()]
    inside = {field.rpartition(".")[2]: field for field in known if field.rpartition(".")[0] == section}
    anywhere = {field.rpartition(".")[2]: field for field in reversed(known)}
    near = [field for field in known if field.rpartition(".")[2] == name]
    near = near or [inside[found] for found in get_close_matches(name, inside, n=1)]
    near = near or [anywhere[found] for found in get_close_matches(name, anywhere, n=1, cutoff=0.75)]
    return f"did you mean {' or '.join(map(repr, near))}?" if near else f"expected one of {', '.join(inside)}"


def _sections() -> list[str]:
    return list(dict.fromkeys(part for field in field_names() for part in list(_and_sections_of(field))[1:]))


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
