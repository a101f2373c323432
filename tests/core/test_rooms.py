"""The walls of d3po_core's rooms: no room needs one that needs it, and some need only the ground."""

import ast
from collections import defaultdict
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from d3po_core.paths import PROJECT_ROOT

CORE = PROJECT_ROOT / "d3po_core"
GROUND = "ground"  # the files beside the rooms, which everyone may import
ON_THE_GROUND = ("store", "denoising", "preferences", "speed")


def room_of(dotted: str) -> str:
    """The room of a module, given without the package's name."""
    first = dotted.partition(".")[0]
    return first if (CORE / first).is_dir() else GROUND


def needed_by(file: Path) -> set[str]:
    """Rooms that a file imports anywhere, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "d3po_core":
            below = str(node.module).partition(".")[2]
            found |= {room_of(below)} if below else {room_of(alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {room_of(alias.name[10:]) for alias in node.names if alias.name.startswith("d3po_core.")}
    return found


def arrows() -> dict[str, set[str]]:
    """Room -> the other rooms that it needs."""
    needs: dict[str, set[str]] = defaultdict(set)
    for file in CORE.rglob("*.py"):
        inner = file.relative_to(CORE).parts
        own = inner[0] if len(inner) > 1 else GROUND
        needs[own] |= needed_by(file) - {own}
    return needs


def test_there_are_rooms_and_arrows() -> None:
    needs = arrows()
    assert {*ON_THE_GROUND, "models", "training", "sampling", "page", GROUND} <= needs.keys()
    assert {"models", "processes"} <= needs["training"]


def test_no_room_needs_one_that_needs_it() -> None:
    assert list(TopologicalSorter(arrows()).static_order())  # a circle is a CycleError that names it


@pytest.mark.parametrize("room", ON_THE_GROUND)
def test_some_rooms_need_only_the_ground(room: str) -> None:
    assert arrows()[room] <= {GROUND}


def test_the_ground_needs_no_room() -> None:
    assert arrows()[GROUND] == set()


def test_every_room_says_what_it_is_for() -> None:
    for folder in (path for path in CORE.iterdir() if any(path.glob("*.py"))):
        text = (folder / "__init__.py").read_text()
        assert ast.get_docstring(ast.parse(text)), folder.name
        assert f"`{folder.name}/`" in (PROJECT_ROOT / "ARCHITECTURE.md").read_text(), folder.name
