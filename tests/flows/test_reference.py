"""The reference covers the code: whatever can be set, typed or asked has a description."""

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from d3po.flows import reference
from d3po_core.config import TrainConfig
from d3po_core.paths import PROJECT_ROOT
from d3po_core.store.columns import MEANINGS, SHARED


def test_everything_is_documented() -> None:
    assert reference.undocumented() == []


def test_what_has_no_description_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainConfig.model_fields["beta"], "description", None)
    monkeypatch.delitem(SHARED, "drowned")
    monkeypatch.delitem(MEANINGS, "groups")
    assert {"train train.beta", "updates drowned", "rounds drowned", "groups"} <= set(reference.undocumented())


def test_no_description_is_of_a_column_that_is_gone() -> None:
    there = {(entry.section, entry.name) for entry in reference.columns()}
    assert {(table, name) for table, (_, own) in MEANINGS.items() for name in own} <= there
    assert set(SHARED) <= {name for _, name in there}


def test_pages_say_what_the_code_says() -> None:
    configuration, objectives, commands, tables, python = (page() for page in reference.PAGES.values())
    assert "| `train.beta` | `float` | `300.0` |" in configuration
    assert "| `runs_dir` | `str or None` |" in configuration
    assert "## d3po discard-round" in commands
    assert "Learns from good and bad images and final images; trains the conditional prediction" in objectives
    assert "| `settings.bad_weight` | `float` | `1.0` | Weight of bad images |" in objectives
    for page in (configuration, objectives, commands, tables, python):
        assert not re.search(r"`[^`\n]*\\\|[^`\n]*`", page), "a backslash shows"
    assert (
        "| `--with-judgements, --no-with-judgements` | `False` | Even if people have judged the round already |"
        in commands
    )
    assert "| `winner_scores` | `map(varchar, double)` |" in tables
    assert "## Campaign.load(round='champion', pipeline=None)" in python
    assert "## Campaign.champion\n" in python


@pytest.mark.skipif(importlib.util.find_spec("material") is None, reason="the extra docs is not installed")
def test_the_site_builds_without_a_warning_and_takes_nothing_from_elsewhere(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert {"configuration.html", "commands.html", "tables.html", "tutorial.html"} <= {page.name for page in pages}
    for page in pages:
        loaded = re.findall(r"<(?:script|img|iframe)[^>]*src=.?https?:[^>]*>", page.read_text())
        loaded += re.findall(r"<link[^>]*rel=.?(?:stylesheet|preconnect)[^>]*https?:[^>]*>", page.read_text())
        assert loaded == [], page


def texts_of_the_code() -> list[str]:
    """Every text in the sources, with … for what is filled in."""
    found = []
    for folder in ("flows", "tasks", "d3po_core", "d3po"):
        for file in (PROJECT_ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.JoinedStr):
                    found.append("".join(str(p.value) if isinstance(p, ast.Constant) else "…" for p in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


TEXTS = "\0".join(texts_of_the_code())
QUOTED = re.findall(r"```text\n(.*?)\n```", (PROJECT_ROOT / "docs/troubleshooting.md").read_text(), re.S)


def is_printed(message: str) -> bool:
    return bool(re.search(r"[^\0]*?".join(re.escape(piece) for piece in message.split("…")), TEXTS))


def test_troubleshooting_quotes_messages() -> None:
    assert len(QUOTED) > 10
    assert not is_printed("model.device is 'cuda' and no CUDA device is visible")


@pytest.mark.parametrize("message", QUOTED)
def test_a_quoted_message_is_one_of_the_program(message: str) -> None:
    assert is_printed(message)
