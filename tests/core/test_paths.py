"""Which folder is the project, and what starts there."""

import os
from pathlib import Path

import pytest

from d3po_core import paths
from d3po_core.errors import D3POError
from d3po_core.paths import (
    PROJECT_ROOT,
    data_folder,
    find_project,
    path_in_project,
    project_folder,
    python_path,
    resolve_path,
)

OURS = "deployments:\n- name: mine\n  entrypoint: d3po.flows.round.d3po\n"
FOREIGN = "deployments:\n- name: theirs\n  entrypoint: flows/theirs.py:main\n"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project; the working directory is two folders below it."""
    monkeypatch.delenv("D3PO_PROJECT", raising=False)
    monkeypatch.delenv("D3PO_DATA", raising=False)
    (tmp_path / "project/below/deep").mkdir(parents=True)
    (tmp_path / "project/prefect.yaml").write_text(OURS)
    monkeypatch.chdir(tmp_path / "project/below/deep")
    return tmp_path / "project"


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As if the packages lay in site-packages."""
    monkeypatch.setattr(paths, "PROJECT_ROOT", tmp_path / "site-packages")


def test_the_project_is_the_nearest_folder_upwards(project: Path) -> None:
    assert find_project() == project_folder() == project
    assert data_folder() == project / "data"
    assert resolve_path("data/prompts") == project / "data/prompts"
    assert path_in_project(project / "data/runs/a") == "data/runs/a"
    assert path_in_project(project.parent / "b") == str(project.parent / "b")
    (project / "below/prefect.yaml").write_text(OURS)
    assert find_project() == project / "below"


def test_another_projects_deployments_are_passed_over(project: Path) -> None:
    (project / "below/prefect.yaml").write_text(FOREIGN)
    assert find_project() == project
    (project / "below/deep/prefect.yaml").mkdir()
    assert find_project() == project


def test_the_variable_comes_first_and_must_name_a_project(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = project.parent / "other"
    other.mkdir()
    monkeypatch.setenv("D3PO_PROJECT", "../../../other")  # from the working directory
    with pytest.raises(D3POError, match=r"D3PO_PROJECT is '\.\./\.\./\.\./other', where no prefect\.yaml deploys"):
        find_project()
    (other / "prefect.yaml").write_text(OURS)
    assert find_project() == other


def test_outside_a_project_it_is_the_clone(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project.parent)
    assert find_project() == PROJECT_ROOT
    assert python_path().split(os.pathsep)[0] == str(PROJECT_ROOT)


@pytest.mark.usefixtures("installed")
def test_an_installed_package_outside_a_project_says_how_to_make_one(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/theirs")
    monkeypatch.chdir(project.parent)
    assert find_project() is None
    assert python_path() == "/theirs"
    for needs_one in (project_folder, data_folder, lambda: resolve_path("data/prompts")):
        with pytest.raises(D3POError, match=r"in no project of d3po.*`d3po init FOLDER`"):
            needs_one()
    assert resolve_path("/somewhere/model") == Path("/somewhere/model")
    assert path_in_project(Path("/somewhere")) == "/somewhere"
    monkeypatch.setenv("D3PO_DATA", str(project / "elsewhere"))
    assert data_folder() == project / "elsewhere"


def test_a_removed_working_directory_is_no_error_of_its_own(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = project / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert find_project() == PROJECT_ROOT
    monkeypatch.setenv("D3PO_DATA", "/data")
    assert data_folder() == Path("/data")
