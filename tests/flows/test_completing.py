"""What the shell completes, and how fast: without torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from d3po.flows.commands import completing
from d3po_core.paths import PROJECT_ROOT


def words(choices: list[tuple[str, str]]) -> list[str]:
    return [word for word, _ in choices]


def test_campaigns_are_those_of_the_data_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("D3PO_DATA", str(tmp_path))
    assert completing.campaigns("") == []
    for name in ("mine", "minor", "other"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "campaign.json").write_text("{}")
    (tmp_path / "runs" / "minus").mkdir()
    assert words(completing.campaigns("mi")) == ["mine", "minor"]
    monkeypatch.setenv("D3PO_DATA", "~nobody-of-this-name/data")
    assert completing.campaigns("") == []


@pytest.mark.parametrize(
    ("typed", "found"),
    [
        ("train.lear", ["train.learning_rate="]),
        ("model.precision=", ["model.precision=no", "model.precision=fp16", "model.precision=bf16"]),
        ("model.prediction_type=v", ["model.prediction_type=v_prediction"]),
        ("model.compile=", ["model.compile=true", "model.compile=false"]),
        ("judge.scorers=pick", ["judge.scorers=pickscore"]),
        ("evaluate.unseen=brightness,hps", ["evaluate.unseen=brightness,hpsv2"]),
        ("train.beta=", []),
        ("nothing=", []),
    ],
)
def test_settings_are_fields_and_their_values(typed: str, found: list[str]) -> None:
    assert words(completing.settings(typed)) == found


def test_a_damaged_project_completes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "prefect.yaml").write_text("- [d3po.flows.")
    monkeypatch.setenv("D3PO_PROJECT", str(tmp_path))
    assert completing.deployments("") == []


def test_the_shell_gets_deployments_without_loading_torch() -> None:
    asked = {"_D3PO_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": "d3po run sd15"}
    program = (
        "import sys; from d3po.flows.commands.line import app; import atexit;"
        "atexit.register(lambda: print('torch' in sys.modules, 'prefect' in sys.modules)); app(prog_name='d3po')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | asked, cwd=PROJECT_ROOT, capture_output=True, text=True
    )
    assert '"sd15"' in done.stdout
    assert '"sd15-human"' in done.stdout
    assert done.stdout.endswith("False False\n")
