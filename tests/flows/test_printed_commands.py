"""Every command that documents, pages and messages print is one that the command line takes."""

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from d3po.flows.commands.line import app
from d3po.flows.presets import presets
from d3po_core.paths import PROJECT_ROOT

DOCUMENTS = [
    *PROJECT_ROOT.glob("*.md"), *(PROJECT_ROOT / "docs").rglob("*.md"), PROJECT_ROOT / "tests/benchmarks/README.md",
    PROJECT_ROOT / "d3po/project/README.md", PROJECT_ROOT / "d3po/project/my_scorer.py",
    *(PROJECT_ROOT / "d3po_core").rglob("*.html"),
]  # fmt: skip
SOURCES = [path for folder in ("flows", "tasks", "d3po_core") for path in (PROJECT_ROOT / folder).rglob("*.py")]
# What stands for a value in a text, and a value of its kind.
STANDS_FOR = {
    "FILE": "file", "FOLDER": "folder", "C": "c", "R": "1", "N": "1", "NAME": "ann", "MODE": "pair", "ID": "r1-g0-m0",
    "ROUND": "1", "NUMBER": "8701", "X": "1",
}  # fmt: skip
(USAGE_ERROR,) = typer.BadParameter.__bases__  # of the command-line library that Typer brings
COMMAND = re.compile(r"d3po [a-z].*")


def in_document(text: str) -> Iterator[str]:
    """Lines of fenced blocks and spans of code that begin with the command's name; continued lines are joined."""
    text = text.replace("\\\n", " ")
    for fence in re.findall(r"```\w*\n(.*?)```", text, re.S):
        yield from (line.strip() for line in fence.splitlines())
    yield from (line.strip() for line in re.findall(r"^ {4}(\S.*)$", text, re.M))
    without_fences = re.sub(r"```.*?```", "", text, flags=re.S)
    for spans in re.findall(r"`([^`]+)`|<code>([^<]+)</code>", without_fences):
        yield from (" ".join(span.split()) for span in spans)


def in_source(path: Path) -> Iterator[str]:
    """Commands in a module's texts, each up to the end of its line or its quotes; X for what is filled in."""
    tree = ast.parse(path.read_text())
    joined = {part for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            text = "".join(str(part.value) if isinstance(part, ast.Constant) else "X" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in joined:
            text = node.value
        else:
            continue
        for line in text.splitlines():
            yield from re.findall(r"`(d3po [^`]+)`", line)
            yield from re.findall(r"(?:type|type next|ask them|to try again|such as): (d3po [a-z][^;,)]*)", line)
            yield from re.findall(r"^\s*(d3po [a-z-]+ .*)$", line)


def printed() -> list[tuple[str, str]]:
    found = {(path.name, line) for path in DOCUMENTS for line in in_document(path.read_text())}
    found |= {(path.name, line) for path in SOURCES for line in in_source(path)}
    return sorted((place, line) for place, line in found if COMMAND.fullmatch(line))


def arguments_of(line: str) -> list[str]:
    """A command's words: comments and what lies behind a pipe left out, optional parts given, names filled in."""
    line = re.sub(r"\s+#.*", "", line).split(" | ")[0].split("; ")[0].rstrip(".:")
    line = re.sub(r"\{\{.*?\}\}", "X", line).replace("--X-port <a free port>", "--label-port 8701")
    line = re.sub(r"(?<![=\w])\[(--[^\]]*)\]", r"\1", line)
    return [STANDS_FOR.get(word, word) for word in shlex.split(line)[1:]]


def parsed(line: str) -> None:
    name, *arguments = arguments_of(line)
    chosen = typer.main.get_group(app).commands.get(name)
    assert chosen is not None, f"no command {name}"
    if arguments:  # a name alone speaks of the command
        chosen.make_context(name, [*arguments])  # which takes words off the list
    if name in ("run", "submit") and arguments and not arguments[0].startswith(("-", "X")):
        assert arguments[0] in presets()


def test_there_are_commands_to_look_at() -> None:
    places = {place for place, _ in printed()}
    assert {
        "README.md",
        "resume.md",
        "questions.md",
        "judgements.md",
        "waiting.py",
        "report.py",
        "template.html",
    } <= places
    assert len(printed()) > 60


@pytest.mark.parametrize(("place", "line"), printed())
def test_a_printed_command_is_taken(place: str, line: str) -> None:
    parsed(line)


def test_make_and_deployments_that_documents_name_exist() -> None:
    text = "\n".join(path.read_text() for path in DOCUMENTS)
    makefile = (PROJECT_ROOT / "Makefile").read_text()
    named = set(re.findall(r"^make ([\w./-]+)", text, re.M)) | set(re.findall(r"`make ([\w./-]+)`", text))
    assert {"demo", "docs", "up"} <= named
    assert [name for name in named if not re.search(rf"^{re.escape(name)}:", makefile, re.M)] == []
    assert set(re.findall(r"prefect deployment run d3po/([\w-]+)", text)) <= set(presets())


WRONG = ("d3po prune --dryrun", "d3po export-sheet --campaign c", "d3po nothing", "d3po run nowhere")


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_command_would_be_noticed(line: str) -> None:
    with pytest.raises((USAGE_ERROR, AssertionError)):
        parsed(line)
