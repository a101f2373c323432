"""``d3po plan``, and what ``d3po run`` says and refuses before any server starts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from d3po.flows.commands.line import app
from d3po.flows.planning import announce
from d3po.flows.presets import deployment_config

D3PO = str(Path(sys.executable).with_name("d3po"))


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("D3PO_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def test_a_plan_says_what_rounds_do_and_where_settings_come_from(data: Path) -> None:
    arguments = ["plan", "human", "--campaign", "mine", "--rounds", "2", "--set", "seed=3", "--json"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0
    plan = json.loads(done.output)
    assert plan["rounds"] == [0, 1, 2]
    assert plan["work"]["images"] == 24 * 7
    assert "label" in plan["work"]["stages"]
    assert {setting["field"]: setting["from"] for setting in plan["settings"]} == {
        "campaign": "--campaign", "seed": "--set", "sample.groups_per_round": "deployment human",
        "sample.group_size": "deployment human", "judge.labeller": "deployment human",
        "judge.people.guideline": "deployment human",
    }  # fmt: skip
    assert not data.exists()
    shown = CliRunner().invoke(app, arguments[:-1]).output
    assert "168 images: 24 groups of 7" in shown
    assert "deployment human" in shown


def test_a_plan_that_cannot_work_lists_all_problems_and_fails() -> None:
    done = CliRunner().invoke(
        app, ["plan", "round", "--set", "judge.scorers=[beauty]", "--set", "sample.prompts=no.txt"]
    )
    assert done.exit_code == 1
    told = [line for line in done.stderr.splitlines() if line.startswith("d3po: ")]
    assert [line.split("'")[1] for line in told] == ["no.txt", "beauty"]


def test_a_run_begins_with_three_lines(capsys: pytest.CaptureFixture[str]) -> None:
    announce(deployment_config("round", None, []), 12)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == ["what", "how long", "where"]
    assert "rounds 1 to 12: 128 images, up to 448 pairs, up to 4 updates, 144 held-out images per round" in lines[0]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [(("sd15",), "meant for a GPU (model.precision fp16, model.compile)"),
     (("round", "--set", "judge.scorers=[beauty]"), "scorer 'beauty' is not known")],
)  # fmt: skip
def test_a_run_that_cannot_work_stops_in_one_line_before_any_server(
    arguments: tuple[str, ...], expected: str, data: Path
) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")} | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([D3PO, "run", *arguments], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert expected in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""
    assert not data.exists()
