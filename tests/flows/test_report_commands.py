"""``d3po compare`` and ``d3po report``: what they print and write, and what they refuse."""

from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from d3po.flows.commands import report as report_commands
from d3po.flows.commands.parts import outside_campaigns
from d3po_core.errors import D3POError
from d3po_core.people.blind import begin_comparison
from d3po_core.store.files import new_folder
from tests.core.evaluation.compared import say
from tests.core.little_campaign import LittleCampaign

app = typer.Typer()
app.command()(report_commands.compare)
app.command()(report_commands.report)


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Campaigns one and two share prompts and seeds; three has other seeds. Round 1 of each is its best."""
    monkeypatch.setenv("D3PO_DATA", str(tmp_path))
    prompts = [f"a thing of kind {i}" for i in range(8)]
    for name, first_seed, best in (("one", 0, 0.8), ("two", 0, 0.9), ("three", 50, 0.7)):
        campaign = LittleCampaign(tmp_path / "runs" / name, prompts, first_seed=first_seed)
        for number, score in enumerate((0.2, best, 0.5)):
            campaign.add_round(number, np.full((8, 2), score))
    return tmp_path / "runs"


def invoke(*words: str) -> str:
    result = CliRunner().invoke(app, words, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def cells(output: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in output.splitlines() if line[:1] == "│"]


def test_compare_sets_base_champion_and_latest_side_by_side_unless_told_otherwise(runs: Path) -> None:
    base, champion, latest = cells(invoke("compare", "--campaign", "one"))
    assert base[:2] == ["base", "0.200 [0.200, 0.200]"]
    assert champion[:1] == ["round 1, champion"]
    assert champion[2:5] == ["+0.600 [+0.600, +0.600]", "1.000 [0.631, 1.000]", "better"]
    assert latest[:1] == ["round 2, latest"]
    assert latest[2].startswith("+0.300")


def test_compare_takes_rounds_of_other_campaigns_and_writes_a_row_for_each(runs: Path) -> None:
    picture = runs / "picture.png"
    output = invoke("compare", "1", "two:champion", "two:base", "--campaign", "one", "--output", str(picture))
    assert [row[0] for row in cells(output)] == ["one: round 1", "two: round 1, champion", "two: base"]
    assert [row[4] for row in cells(output)] == ["", "better", "worse"]
    with Image.open(picture) as image:
        assert image.height == 64 + 3 * 100 + 4


def test_compare_says_how_often_people_preferred_a_checkpoint_or_how_to_ask_them(runs: Path) -> None:
    folder = runs / "one"
    words = " ".join(invoke("compare", "base", "1", "--campaign", "one").split())
    assert "ask them: d3po label --compare 1 --against base --campaign one" in words
    found = begin_comparison(folder, 1, 0, pairs=8).comparison
    for number, vote in enumerate((1, 1, 1, 1, 1, 1, 1, 1)):
        say(folder, found, number, vote)
    *_, row = cells(invoke("compare", "base", "1", "2", "--campaign", "one"))
    assert row[0] == "round 1"
    assert row[1].startswith("1.000 [0.631")
    assert row[2:] == ["better", "8", "8", "0", "1"]
    *_, row = cells(invoke("compare", "1", "base", "--campaign", "one"))
    assert row[:1] + row[2:] == ["base", "worse", "8", "8", "0", "1"]
    assert "people" not in invoke("compare", "one:1", "two:1")


def test_compare_names_its_picture_after_the_rounds(runs: Path) -> None:
    invoke("compare", "0", "2", "two:1", "--campaign", "one")
    assert (runs / "one" / "report" / "compare-0-2-two.1.png").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("1", "three:1"), "share no held-out prompt and seed"),
        (("1", "9"), "'9' is no finished round of campaign 'one'"),
        (("1", "champion"), "is one checkpoint .*expected two or more"),
        (("1", "four:1"), "campaign 'four' is not in .*one, three, two"),
        (("1", "../x:1"), "holds no campaign"),
    ],
)
def test_compare_refuses_in_one_line(runs: Path, words: tuple[str, ...], message: str) -> None:
    with pytest.raises(D3POError, match=message) as caught:
        invoke("compare", *words, "--campaign", "one")
    assert "\n" not in str(caught.value)


def test_report_says_where_it_is(runs: Path) -> None:
    output = invoke("report", "--campaign", "one")
    assert str(runs / "one" / "report.html") in output.replace("\n", "")
    assert (runs / "one" / "report.html").stat().st_size > 10_000
    assert invoke("report", "--campaign", "one", "--output", str(runs / "r.html"))
    assert (runs / "r.html").exists()


def test_an_output_that_cannot_be_a_path_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "ring").symlink_to(tmp_path / "gnir")
    (tmp_path / "gnir").symlink_to(tmp_path / "ring")
    for name in (tmp_path / "ring" / "x", Path("a\0b"), Path("~nobody-of-this-name/x")):
        with pytest.raises(D3POError, match=r"^--output '.*': cannot be a path \(.*\); give another$"):
            outside_campaigns(name)
        with (
            pytest.raises(D3POError, match=r"^--output '.*': cannot be a path \(.*\); give another$"),
            new_folder(name),
        ):
            pass
