"""The site's reference pages, generated from the code: configuration, commands, tables and views, Python."""

import inspect
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

import d3po
from d3po.campaign import Campaign
from d3po.flows.commands.line import app
from d3po_core.config import CampaignConfig
from d3po_core.queries.views import VIEWS, connect_views
from d3po_core.store.columns import MEANINGS, Entry, meaning
from d3po_core.store.tables import SCHEMAS
from d3po_core.training.objectives import OBJECTIVES


def _sections(model: type[BaseModel] = CampaignConfig, path: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    yield path, model
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _sections(field.annotation, f"{path}.{name}".lstrip("."))


def fields() -> list[Entry]:
    """Every field of the configuration with its default and description."""
    found = []
    for path, model in _sections():
        for name, field in model.model_fields.items():
            if not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
                takes = _type_name(field.annotation)
                default = "required" if field.default is PydanticUndefined else _plain(field.default)
                found.append(Entry(path, f"{path}.{name}".lstrip("."), (takes, default), field.description or ""))
    return found


def parameters() -> list[Entry]:
    """Every parameter of every command with its default and help; the command itself has an empty name."""
    found = []
    for command, parsed in _commands(typer.main.get_group(app)):
        found.append(Entry(command, "", (), parsed.help or ""))
        for option in parsed.params:
            is_argument = option.param_type_name == "argument"
            name = option.name.upper() if is_argument else ", ".join([*option.opts, *option.secondary_opts])
            default = "required" if option.required else _plain(option.default)
            found.append(Entry(command, name, (default,), getattr(option, "help", None) or ""))
    return found


def _commands(group: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    """Every command by its full name, also those of a command that has some of its own."""
    for name, parsed in group.commands.items():
        yield f"{before}{name}", parsed
        if hasattr(parsed, "commands"):
            yield from _commands(parsed, f"{before}{name} ")


def columns() -> list[Entry]:
    """Every column of every table and view with its type and meaning."""
    found = []
    with tempfile.TemporaryDirectory() as folder, connect_views(Path(folder)) as connection:
        for table in [*SCHEMAS, *VIEWS]:
            rows = connection.execute(f"DESCRIBE {table}").fetchall()
            found += [Entry(table, name, (kind.lower(),), meaning(table, name)) for name, kind, *_ in rows]
    return found


def undocumented() -> list[str]:
    """Fields, commands, options, tables and columns without a description."""
    missing = [
        f"{e.section} {e.name}".strip()
        for e in [*fields(), *objective_settings(), *parameters(), *columns()]
        if not e.text.strip()
    ]
    missing += [name for name in [*SCHEMAS, *VIEWS] if not MEANINGS.get(name, ("",))[0]]
    missing += [f"Campaign.{name}" for name, value in vars(Campaign).items() if name[0] != "_" and not value.__doc__]
    return missing + [path or "config" for path, model in _sections() if not inspect.getdoc(model)]


def configuration_page() -> str:
    """The page of the configuration, in Markdown."""
    entries, parts = fields(), ["# Configuration", "Set a field with `--set FIELD=VALUE`, or in `prefect.yaml`."]
    for path, model in _sections():
        own = [e for e in entries if e.section == path]
        parts += [f"## {path or 'Campaign'}", inspect.getdoc(model) or "", _table(("field", "takes", "default"), own)]
    return "\n\n".join(parts) + "\n"


LABELS = {"pairs": "pairs", "numbers": "a number per image", "good_bad": "good and bad images"}
SOURCES = {"trajectory": "stored steps", "fresh_noise": "final images", "own_noise": "final images and stored latents"}
REFERENCES = {"any": "`train.reference`", "round_start": "the round's start", "none": "none"}


def objective_settings() -> list[Entry]:
    """Every setting of every objective with its default and description."""
    return [
        Entry(name, f"settings.{field}", (_type_name(known.annotation), _plain(known.default)), known.description or "")
        for name, kind in OBJECTIVES.items()
        for field, known in kind.model_fields.items()
    ]


def objectives_page() -> str:
    """The page of the objectives, in Markdown."""
    entries = objective_settings()
    parts = [
        "# Objectives",
        "`--set train.objective=NAME` chooses one, `--set train.settings.FIELD=VALUE` sets it: "
        "[choose an objective](../how-to/choose-an-objective.md), [formulas](../explanation/objectives.md).",
    ]
    for name, kind in OBJECTIVES.items():
        own = [e for e in entries if e.section == name]
        facts = (
            f"Learns from {LABELS[kind.labels]} and {SOURCES[kind.source]}; trains the "
            f"{'guided' if kind.guided else 'conditional'} prediction; reference: {REFERENCES[kind.reference]}."
        )
        parts += [f"## {name}", f"`{inspect.getdoc(kind)}`", facts]
        parts += [_table(("setting", "takes", "default"), own)] if own else []
    return "\n\n".join(parts) + "\n"


def commands_page() -> str:
    """The page of the commands, in Markdown."""
    entries, parts = parameters(), ["# Commands", "`d3po COMMAND --help` says the same in the terminal."]
    for command in [e for e in entries if not e.name]:
        options = [e for e in entries if e.section == command.section and e.name]
        parts += [f"## d3po {command.section}", inspect.cleandoc(command.text)]
        parts += [_table(("option", "default"), options)] if options else []
    return "\n\n".join(parts) + "\n"


def tables_page() -> str:
    """The page of the tables and views, in Markdown."""
    entries, parts = columns(), ["# Tables and views", "Ask them with `d3po query`: [questions](../questions.md)."]
    for name in [*SCHEMAS, *VIEWS]:
        kind = "Table" if name in SCHEMAS else "View"
        own = [e for e in entries if e.section == name]
        parts += [f"## {name}", f"{kind}; each row is {MEANINGS[name][0]}.", _table(("column", "type"), own)]
    return "\n\n".join(parts) + "\n"


def python_page() -> str:
    """The page of the Python API, in Markdown."""
    parts = ["# Python", "How to use it: [notebooks](../how-to/notebooks.md)."]
    members = [
        (f"d3po.{name}", getattr(d3po, name)) for name in d3po.__all__ if inspect.isfunction(getattr(d3po, name))
    ]
    members += [(f"Campaign.{name}", value) for name, value in vars(Campaign).items() if not name.startswith("_")]
    for name, value in members:
        function: Any = value.fget if isinstance(value, property) else value
        parameters = "" if isinstance(value, property) else _parameters(function)
        parts += [f"## {name}{parameters}", _prose(inspect.getdoc(function) or "")]
    return "\n\n".join(parts) + "\n"


def _parameters(function: Callable[..., Any]) -> str:
    own = [parameter for name, parameter in inspect.signature(function).parameters.items() if name != "self"]
    return f"({', '.join(str(one.replace(annotation=inspect.Parameter.empty)) for one in own)})"


def _prose(text: str) -> str:
    """A docstring as Markdown: its sections as lists."""
    lines = []
    for line in text.replace("``", "`").splitlines():
        indented = line.startswith("    ")
        lines.append(f"- {line.strip()}" if indented and not line.startswith("     ") else
                     f"\n{line}\n" if line.endswith(":") and " " not in line else line.rstrip())  # fmt: skip
    return "\n".join(lines)


PAGES: dict[str, Callable[[], str]] = {
    "configuration": configuration_page, "objectives": objectives_page, "commands": commands_page,
    "tables": tables_page, "python": python_page,
}  # fmt: skip


def _table(heads: tuple[str, ...], entries: list[Entry]) -> str:
    rows = [(*heads, "meaning"), ("---",) * (len(heads) + 1)]
    rows += [
        (f"`{e.name}`", *(f"`{_cell(c.replace(' | ', ' or '))}`" if c else "" for c in e.cells), _cell(e.text))
        for e in entries
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(text: str) -> str:
    """Text for a cell; code in a cell would show the backslash."""
    return " ".join(text.split()).replace("|", "\\|")


def _type_name(annotation: Any) -> str:
    if isinstance(annotation, type) and not hasattr(annotation, "__args__"):
        return annotation.__name__
    return str(annotation).replace("typing.", "").replace("NoneType", "None").replace("Literal", "one of ")


def _plain(value: Any) -> str:
    if callable(value):
        return ""
    return "" if value is None else str(list(value) if isinstance(value, tuple) else value)
