"""The import rule, flows -> tasks -> d3po_core, and what no source file may contain."""

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from d3po_core.paths import PROJECT_ROOT

LAYERS = ("d3po_core", "tasks", "flows")
FILES = sorted(file for layer in LAYERS for file in (PROJECT_ROOT / layer).rglob("*.py"))
CORE_LEAVES = ("config", "records", "denoising/ddim", "training/loss", "preferences/deriving")


def name_of(file: Path) -> str:
    return file.relative_to(PROJECT_ROOT).as_posix()


def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(), str(file))


def imported(file: Path) -> Iterator[str]:
    """Dotted names that a file imports anywhere, also inside functions."""
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            yield from (without_project(alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(file)}: relative import"
            assert node.module is not None
            yield without_project(node.module)
            yield from (without_project(f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            yield from (without_project(str(name.value)) for name in node.args[:1] if isinstance(name, ast.Constant))


def without_project(dotted: str) -> str:
    """``d3po.tasks.stage`` as ``tasks.stage``."""
    return dotted.removeprefix("d3po.")


def packages(file: Path) -> set[str]:
    return {name.partition(".")[0] for name in imported(file)}


def test_there_is_something_to_check() -> None:
    assert {file.parent.name for file in FILES} >= set(LAYERS)
    assert "diffusers" in packages(PROJECT_ROOT / "d3po_core/models/loading.py")


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports_go_one_way(file: Path) -> None:
    layer = LAYERS.index(file.relative_to(PROJECT_ROOT).parts[0])
    assert packages(file).isdisjoint(LAYERS[layer + 1 :])
    assert "tests" not in packages(file)


@pytest.mark.parametrize("file", [file for file in FILES if "d3po_core" in file.parts], ids=name_of)
def test_core_knows_neither_prefect_nor_mlflow(file: Path) -> None:
    assert packages(file).isdisjoint({"prefect", "mlflow"})


@pytest.mark.parametrize("leaf", CORE_LEAVES)
def test_leaves_of_the_core_import_no_sibling_but_the_lowest(leaf: str) -> None:
    names = {name for name in imported(PROJECT_ROOT / "d3po_core" / f"{leaf}.py") if name.startswith("d3po_core")}
    siblings = {name.split(".")[1] for name in names if "." in name}
    assert siblings <= {"config", "errors", "paths", "sizes", "urls", "ways"}


@pytest.mark.parametrize("file", [*FILES, *sorted((PROJECT_ROOT / "tests").rglob("*.py"))], ids=name_of)
def test_flows_and_tasks_are_imported_by_their_installed_name(file: Path) -> None:
    # As top-level modules they would exist twice, and collide with another project's.
    names = {
        name
        for node in ast.walk(tree(file))
        for name in (
            [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else []
        )
    }
    assert {name.partition(".")[0] for name in names}.isdisjoint({"flows", "tasks"})


def test_exactly_two_modules_import_mlflow() -> None:
    found = {name_of(file) for file in FILES if "mlflow" in packages(file)}
    assert found == {"tasks/tracking/registry.py", "tasks/tracking/store.py"}


def test_tasks_are_defined_in_tasks_and_flows_in_flows() -> None:
    for file in FILES:
        names = set(imported(file))
        layer = file.relative_to(PROJECT_ROOT).parts[0]
        assert layer == "tasks" or "prefect.task" not in names, name_of(file)
        assert layer == "flows" or "prefect.flow" not in names, name_of(file)


@pytest.mark.parametrize("file", [file for file in FILES if "flows" in file.parts], ids=name_of)
def test_no_class_is_defined_in_flows(file: Path) -> None:
    # Prefect runs a flow's file as a module of another name: a class there would exist twice.
    assert [node.name for node in ast.walk(tree(file)) if isinstance(node, ast.ClassDef)] == []


def test_no_file_in_flows_shares_a_name_with_a_package() -> None:
    import importlib.util
    import sys

    for file in (PROJECT_ROOT / "flows").glob("*.py"):
        if file.stem != "__init__":
            assert file.stem not in sys.stdlib_module_names
            assert file.stem not in LAYERS
            assert importlib.util.find_spec(file.stem) is None, file.stem


SOURCES = sorted({*FILES, *(PROJECT_ROOT / "data").glob("*/*.py")})


@pytest.mark.parametrize("file", SOURCES, ids=name_of)
def test_nothing_is_unpickled_and_no_foreign_code_is_run(file: Path) -> None:
    assert packages(file).isdisjoint({"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"})
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.keyword):
            assert node.arg != "trust_remote_code", f"line {node.value.lineno}"
            assert node.arg != "allow_pickle" or ast.unparse(node.value) == "False", f"line {node.value.lineno}"
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert called != "torch.save", f"line {node.lineno}"
            assert called != "torch.load" or options.get("weights_only") == "True", f"line {node.lineno}"
            assert called not in ("eval", "exec"), f"line {node.lineno}"


ELSEWHERE = sorted({*(PROJECT_ROOT / "tests").rglob("*.py"), *(PROJECT_ROOT / "data").glob("*/*.py")})


@pytest.mark.parametrize("file", ELSEWHERE, ids=name_of)
def test_modules_that_tests_benchmarks_and_scripts_name_are_there(file: Path) -> None:
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in ("d3po", "d3po_core", "tests"):
            assert importlib.util.find_spec(str(node.module)), f"line {node.lineno}: {node.module}"


def test_nothing_pickled_is_tracked() -> None:
    suffixes = {".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".bin", ".npy", ".npz", ".joblib"}
    folders = [PROJECT_ROOT / layer for layer in LAYERS]
    folders += [PROJECT_ROOT / "data" / name for name in ("shapes", "prompts")]
    assert [file for folder in folders for file in folder.rglob("*") if file.suffix in suffixes] == []


def test_a_command_starts_without_what_it_may_not_need() -> None:
    slow = {"duckdb", "mlflow", "numpy", "prefect", "pyarrow", "torch"}
    script = f"import d3po.flows.commands.line, sys; print(sorted({slow} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], cwd=PROJECT_ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
