"""A new project: what it holds, and what is refused."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from d3po.flows.presets import deployment_config, presets
from d3po.flows.project import deployments, make_project
from d3po.flows.server_programs import server_environment
from d3po_core.errors import D3POError
from d3po_core.paths import PROJECT_ROOT, find_project
from d3po_core.sampling.prompts import load_prompts
from d3po_core.scorers.finding import load_scorer


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A new project, which is the working directory."""
    monkeypatch.delenv("D3PO_PROJECT", raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])  # which finding a scorer extends
    make_project(tmp_path / "new")
    monkeypatch.chdir(tmp_path / "new")
    return tmp_path / "new"


def test_a_new_project_holds_the_clones_deployments_prompts_and_model(project: Path) -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "prefect.yaml", "data"], cwd=PROJECT_ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    for name in set(tracked) - {"data/shapes/train_base_model.py"}:
        assert (project / name).read_bytes() == (PROJECT_ROOT / name).read_bytes(), name
    assert {".gitignore", "README.md", "my.yaml", "my_scorer.py"} <= {path.name for path in project.iterdir()}
    assert not any(path.is_symlink() for path in project.rglob("*"))


def test_it_is_a_project_whose_deployments_prompts_and_scorer_are_found(project: Path) -> None:
    assert find_project() == project
    file = project / "prefect.yaml"
    file.write_text(file.read_text().replace("name: sd15\n", "name: of_this_project\n"))
    assert "of_this_project" in presets()
    config = deployment_config("of_this_project", None, [])
    assert load_prompts(config.sample.prompts, "prompt", "sample.prompts")
    images = np.zeros((2, 4, 4, 3), np.uint8)
    images[1, ..., 0] = 255
    assert load_scorer("my_scorer:redness")(images, ["a", "b"]).tolist() == [0.0, 1.0]


def test_servers_find_the_project_from_anywhere(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("D3PO_DATA", raising=False)
    given = server_environment("worker", {"prefect": 1, "mlflow": 2, "label": 3}, "login")
    monkeypatch.chdir("/")
    monkeypatch.setenv("D3PO_PROJECT", given["D3PO_PROJECT"])
    assert find_project() == project
    assert given["D3PO_DATA"] == str(project / "data")


def test_the_example_configuration_fits_its_deployment(project: Path) -> None:
    config = deployment_config("round", None, [], project / "my.yaml")
    assert config.campaign == "mine"
    assert config.judge.scorer_weights.keys() == set(config.judge.scorers)


def test_a_folder_that_is_not_empty_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".hidden").write_text("mine")
    for place in (tmp_path, tmp_path / ".hidden"):
        with pytest.raises(D3POError, match="is not empty; name a new or an empty folder: d3po init FOLDER"):
            make_project(place)
    assert [path.name for path in tmp_path.iterdir()] == [".hidden"]


def test_a_project_that_cannot_be_finished_leaves_an_empty_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = []

    def fill(source: Path, target: Path) -> None:
        copied.append(target.name)
        target.write_bytes(source.read_bytes())
        if len(copied) == 5:
            raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(shutil, "copyfile", fill)
    with pytest.raises(D3POError, match="disk"):
        make_project(tmp_path)
    assert len(copied) == 5
    assert "prefect.yaml" not in copied
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text",
    [
        "- [d3po.flows.",
        "entry: d3po.flows.round.d3po",
        "deployments: [d3po.flows.]",
        "deployments: [{name: d3po.flows.}]",
        "deployments: [{name: x, entrypoint: d3po.flows.round.d3po, parameters: 5}]",
        "deployments: [{name: x, entrypoint: d3po.flows.round.d3po, parameters: {config: [1]}}]",
        "# d3po.flows.\ndeployments: " + "[" * 5000,
    ],
)
def test_deployments_that_cannot_be_read_are_one_line(project: Path, text: str) -> None:
    (project / "prefect.yaml").write_text(text)
    with pytest.raises(D3POError, match=r"prefect\.yaml has no deployments that can be read \(.+\); mend") as caught:
        deployments()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["/proc/nowhere", "x" * 300])
def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(D3POError, match=r"^cannot write .+ or name another$"):
        make_project(tmp_path / name)
    assert list(tmp_path.iterdir()) == []
