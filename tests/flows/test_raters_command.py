"""``d3po raters`` on a small campaign: table, csv, json, and what it says when nobody judged."""

import csv
import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from d3po.flows.commands.raters import raters
from d3po_core.config import CampaignConfig
from d3po_core.errors import D3POError
from d3po_core.people.journal import Journal, Submission, sampling_of
from d3po_core.store.campaign import open_campaign
from tests.core.people.labelling import waiting_campaign
from tests.core.people.test_raters import campaign, choices, gold_round, marks


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("D3PO_DATA", str(tmp_path))
    config = CampaignConfig(campaign="small")
    open_campaign(config)
    return config.folder


def ask(*arguments: str) -> Result:
    app = typer.Typer()
    app.command()(raters)
    return CliRunner().invoke(app, ["--campaign", "small", *arguments])


def filled(folder: Path) -> None:
    rounds = {
        1: gold_round(1, 6, ann="100", liar="011") + choices("[left]", [(1.0, 0)] * 8),
        2: marks("ann", "r2-g0", "100", seconds=2.5),
    }
    campaign(folder, rounds, groups=8)


def test_the_table_names_who_is_left_out_and_who_prefers_a_place(folder: Path) -> None:
    filled(folder)
    lines = ask().output.splitlines()
    rows = {name: next(line for line in lines if name in line) for name in ("ann", "liar", "[left]")}
    assert "left out" in rows["liar"]
    assert "left out" not in rows["ann"]
    assert "6/6 [0.54, 1.00]" in rows["ann"]
    assert "prefers the first place" in rows["[left]"]
    assert any("Krippendorff's alpha" in line for line in lines)


def test_csv_and_json_hold_the_same_raters(folder: Path, tmp_path: Path) -> None:
    filled(folder)
    rows = list(csv.DictReader(ask("--format", "csv").output.splitlines()))
    report = json.loads(ask("--format", "json").output)
    assert [row["rater"] for row in rows] == [row["rater"] for row in report["raters"]] == ["[left]", "ann", "liar"]
    assert [row["judgements"] for row in rows] == [str(row["judgements"]) for row in report["raters"]]
    assert report["pairs"] == 6 * 3 + 2 + 3  # of the eight choices, six are on pairs of gold questions
    ask("--format", "json", "--output", str(tmp_path / "report.json"))
    assert json.loads((tmp_path / "report.json").read_text()) == report


def test_a_name_is_neither_markup_nor_a_formula(folder: Path) -> None:
    campaign(folder, {1: marks("=1+[/bold]", "r1-g0", "100") + marks(":smile:", "r1-g0", "100")}, groups=1)
    assert "=1+[/bold]" in ask().output
    assert ":smile:" in ask().output
    rows = csv.DictReader(ask("--format", "csv").output.splitlines())
    assert {row["rater"] for row in rows} == {"'=1+[/bold]", ":smile:"}


def test_a_file_that_cannot_be_written_is_one_line(folder: Path) -> None:
    filled(folder)
    (folder / "file").touch()
    error = ask("--output", str(folder / "file" / "raters.csv")).exception
    assert isinstance(error, D3POError)
    assert "name another --output" in str(error)


def test_a_round_can_be_asked_for_alone(folder: Path) -> None:
    filled(folder)
    report = json.loads(ask("--round", "2", "--format", "json").output)
    assert "left out" not in ask("--round", "2").output  # nobody is, and no legend says so
    assert [(row["rater"], row["judgements"], row["seconds"]) for row in report["raters"]] == [("ann", 1, 2.5)]


def test_what_the_page_holds_of_a_round_that_waits_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("D3PO_DATA", str(tmp_path))
    config = waiting_campaign(tmp_path, "small", pixels=1)
    journal = Journal(config.folder)
    shown = tuple(f"r1-g0-m{member}" for member in range(3))
    sampling = str(sampling_of(config.folder, 1))
    journal.append(
        Submission("a" * 32, sampling, "ann", "mark_bad:r1-g0", 0, "answer", "mark_bad", shown, (0.0, 1.0, 1.0), 2.0)
    )
    report = json.loads(ask("--format", "json").output)
    assert [(row["rater"], row["judgements"], row["seconds"]) for row in report["raters"]] == [("ann", 1, 2.0)]
    assert report["pairs"] == 3
    assert not list((config.folder / "judgements").glob("*"))  # looked at, not written


def test_a_campaign_that_nobody_judged_is_told_so(folder: Path) -> None:
    result = ask()
    assert isinstance(result.exception, D3POError)
    assert "no person has judged anything in campaign 'small' yet" in str(result.exception)
    assert "round 3 of campaign 'small'" in str(ask("--round", "3").exception)
