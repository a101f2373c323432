"""The wheel, outside the clone: what it holds, and a round in a project of its own."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from d3po_core.paths import PROJECT_ROOT
from d3po_core.store.stages import finished_rounds

COMMAND = "import tasks; from d3po.flows.commands.line import main; main()"


def tracked(*names: str) -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *names],
        cwd=PROJECT_ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return listed.stdout.splitlines()


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked wheel, as in site-packages."""
    place = tmp_path_factory.mktemp("install")
    for name in tracked():  # a build writes into its folder
        if not name.startswith(("tests/", "docs/")) or name == "docs/automation.yaml":
            (place / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(PROJECT_ROOT / name, place / "clone" / name, follow_symlinks=False)
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--quiet", "--wheel-dir", str(place)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, str(place / "clone")], check=True)
    shutil.rmtree(place / "clone")
    (wheel,) = place.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place / "site-packages")
    return place / "site-packages"


def command(installed: Path, folder: Path, *words: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    """Run a command of the installed package in a folder."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "D3PO_"))}
    return subprocess.run(
        [sys.executable, "-c", COMMAND, *words], cwd=folder, capture_output=True, text=True, timeout=240,
        env=kept | {"PYTHONPATH": str(installed)} | variables,
    )  # fmt: skip


def foreign(folder: Path) -> Path:
    """A folder with another project's files."""
    folder.mkdir()
    (folder / "tasks.py").touch()
    (folder / "flows").mkdir()
    (folder / "flows/__init__.py").write_text("raise SystemExit('the flows of another project')")
    (folder / "prefect.yaml").write_text("deployments:\n- name: theirs\n  entrypoint: flows/theirs.py:main\n")
    return folder


def test_a_wheel_holds_all_code_and_a_project_under_two_names_of_its_own(installed: Path) -> None:
    names = {path.relative_to(installed).as_posix() for path in installed.rglob("*") if path.is_file()}
    code = {f"d3po/{name}" for name in tracked("flows", "tasks")} | {*tracked("d3po_core", "d3po/*.py")}
    data = {f"d3po/project/{name}" for name in tracked("prefect.yaml", "data") if not name.endswith(".py")}
    assert names >= code | data
    assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == {"d3po", "d3po_core"}
    assert not any("/data/runs/" in name or name.endswith(".pyc") for name in names)


def test_a_command_outside_a_project_says_how_to_make_one_and_writes_nothing(installed: Path, tmp_path: Path) -> None:
    place = foreign(tmp_path / "theirs")
    before = sorted(place.rglob("*"))
    for word in ("run", "up"):
        done = command(installed, place, word, PYTHONDONTWRITEBYTECODE="1")
        assert done.returncode == 2
        assert done.stderr.startswith("d3po: this folder is in no project of d3po")
        assert "`d3po init FOLDER`" in done.stderr
        assert done.stderr.count("\n") == 1
    assert sorted(place.rglob("*")) == before


def test_a_new_project_beside_foreign_files_finishes_a_round_with_its_own_scorer(
    installed: Path, tmp_path: Path
) -> None:
    place = foreign(tmp_path / "theirs")
    made = command(installed, place, "init", "ours")
    assert made.returncode == 0, made.stderr
    assert "d3po run round" in made.stdout
    (place / "ours/tasks.py").touch()
    settings = ("sample.groups_per_round=2", "sample.group_size=2", "evaluate.images_per_prompt=1",
                "evaluate.max_prompts=2", "judge.scorers=[my_scorer:redness]")  # fmt: skip
    options = [part for setting in settings for part in ("--set", setting)]
    done = command(installed, place / "ours", "run", "round", "--campaign", "alone", *options)
    assert done.returncode == 0, done.stderr
    assert "held-out score" in done.stdout
    (base, first) = finished_rounds(place / "ours/data/runs/alone")
    assert (base.round, first.round) == (0, 1)
    assert first.eval_scorer == "my_scorer:redness"


def test_the_guide_names_the_wheel_of_this_version() -> None:
    with (PROJECT_ROOT / "pyproject.toml").open("rb") as stream:
        version = tomllib.load(stream)["project"]["version"]
    guide = (PROJECT_ROOT / "docs/how-to/install.md").read_text()
    assert set(re.findall(r"d3po-[\d.]+-py3-none-any\.whl", guide)) == {f"d3po-{version}-py3-none-any.whl"}
