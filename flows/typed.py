"""Configuration values that a person types: ``--config FILE``, and ``--set FIELD=VALUE`` over it."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from d3po_core.config import PATH_FIELDS, is_url
from d3po_core.config_values import leaves, merge
from d3po_core.errors import D3POError
from d3po_core.paths import HERE, absolute, path_in_project, project_folder, resolve_path

# Their keys are names, which may hold dots.
MAPPINGS = ("scoring.models", "judge.scorer_weights")
HUB_FIELDS = ("model.path", "model.single_file_config", "model.start_from")  # a hub id looks like a relative path

Values = dict[str, Any]
Origins = dict[str, str]


def typed_values(file: Path | None, settings: Sequence[str], campaign: str | None) -> tuple[Values, Origins]:
    """Merge what a person typed, and note where each field was typed.

    A relative path starts in the folder of its file, or in the current folder if it was typed in a setting.

    Args:
        file: a YAML file of configuration values; dotted names are fine.
        settings: ``field=value``, each over the ones before and over the file.
        campaign: the campaign's name, over all others.

    Raises:
        D3POError: the file cannot be read, or a setting is no ``field=value``; the message names file and line.
    """
    values, origins = _from_file(file) if file else ({}, {})
    for setting in settings:
        name, separator, text = setting.partition("=")
        if not separator or not name:
            raise D3POError(f"--set {setting!r}: expected field=value, such as train.learning_rate=1e-3")
        origin = f"--set {name}"
        given = nested(name, _value(text, f"--set {setting[:100]!r}"))
        values = merge(values, _paths_from(given, HERE, dict.fromkeys(leaves(given), origin)))
        origins[name] = origin
    if campaign:
        values, origins["campaign"] = merge(values, {"campaign": campaign}), "--campaign"
    return values, origins


def nested(field: str, value: Any) -> Values:
    """A value as nested mappings, by its dotted field."""
    section = next((name for name in MAPPINGS if field.startswith(f"{name}.")), None)
    parts = [*section.split("."), field.removeprefix(f"{section}.")] if section else field.split(".")
    for part in reversed(parts):
        value = {part: value}
    return dict(value)


def typed_again(field: str, value: Any) -> Any:
    """A value as one types it anywhere: a path that starts at the project becomes absolute."""
    if not _is_path(field, value) or (_may_be_hub_id(field, value) and not resolve_path(value).exists()):
        return value
    return str(project_folder() / Path(value).expanduser())


def _from_file(file: Path) -> tuple[Values, Origins]:
    try:
        text = file.expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise D3POError(f"--config {file}: cannot be read ({reason}); expected a YAML file of fields") from None
    found = _value(text, str(file))
    if found is None:
        return {}, {}
    if not isinstance(found, dict):
        raise D3POError(f"{file}: holds no fields; expected lines such as `train: {{learning_rate: 1e-3}}`")
    lines = _lines_once(yaml.compose(text, yaml.SafeLoader), file)
    values: Values = {}
    for key, value in found.items():
        values = merge(values, nested(str(key), value))
    origins = {field: f"{file}, line {line}" for field, line in lines.items()}
    return _paths_from(values, file.expanduser().absolute().parent, origins), origins


def _value(text: str, origin: str) -> Any:
    try:
        # Aliases can expand until they fill the memory.
        if not any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            return yaml.safe_load(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f", line {mark.line + 1}" if mark and not origin.startswith("--") else ""
        raise D3POError(f"{origin}{where}: the value is not YAML ({error.problem}); quote it") from None
    except (yaml.YAMLError, RecursionError, ValueError):
        raise D3POError(f"{origin}: the value is not YAML; quote it") from None
    raise D3POError(f"{origin}: has a YAML alias (*name); write the value out, or quote it")


def _lines_once(node: yaml.Node, file: Path) -> dict[str, int]:
    """The line of each field of a file.

    Raises:
        D3POError: a field is there twice, be it by its dotted name.
    """
    seen: dict[str, int] = {}
    for field, line in _lines(node):
        if field in seen:
            raise D3POError(f"{file}, line {line}: {field} stands in line {seen[field]} already; drop one of them")
        seen[field] = line
    return seen


def _lines(node: yaml.Node, path: str = "") -> Iterator[tuple[str, int]]:
    """Each field of a file with its line."""
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        field = f"{path}.{key.value}".lstrip(".")
        yield field, key.start_mark.line + 1
        yield from _lines(value, field)


def _paths_from(value: Any, folder: Path, origins: Origins, field: str = "") -> Any:
    """Values whose relative paths, typed in a folder, lead to the same place from anywhere."""
    if isinstance(value, dict):
        return {key: _paths_from(v, folder, origins, f"{field}.{key}".lstrip(".")) for key, v in value.items()}
    if not _is_path(field, value):
        return value
    origin = origins.get(field, field)
    if not os.path.exists(absolute(value, folder, origin)):
        if _may_be_hub_id(field, value):
            return value
        shipped = resolve_path(value)
        if field != "runs_dir" and not Path(value).is_absolute() and shipped.exists():
            raise D3POError(
                f"{origin}: {value!r} is not in {folder.absolute()}, where it is typed; "
                f"if you mean the project's, write {shipped}"
            )
    here = Path(os.path.abspath(folder / Path(value).expanduser()))  # keeps links, unlike resolve
    return path_in_project(here)


def _is_path(field: str, value: Any) -> bool:
    named = field in PATH_FIELDS or field.startswith("scoring.models.")
    return named and isinstance(value, str) and bool(value) and not is_url(value) and "\0" not in value


def _may_be_hub_id(field: str, value: str) -> bool:
    named = field in HUB_FIELDS or field.startswith("scoring.models.")
    most = 2 if field == "model.start_from" else 1  # owner/name/file
    return named and not value.startswith((".", "/", "~")) and value.count("/") <= most
