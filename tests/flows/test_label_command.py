"""``d3po label --compare``: what it begins, what it says, and what it refuses."""

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from d3po.flows.commands import label as label_command
from d3po.flows.server_files import write_state
from d3po.tasks.tracking import delivery
from d3po_core.errors import D3POError
from d3po_core.people.blind import comparisons_of
from tests.core.evaluation.compared import evaluated, say_all

app = typer.Typer(pretty_exceptions_enable=False)
app.command()(label_command.label)


@pytest.fixture
def campaign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("D3PO_DATA", str(tmp_path))
    monkeypatch.setattr(label_command, "_page_runs", lambda *_: True)  # as beside `make up`
    return evaluated(tmp_path / "runs" / "x")


def label(*words: str) -> str:
    result = CliRunner().invoke(app, [*words, "--rater", "ann"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_it_says_what_is_compared_and_gives_the_links(campaign: Path) -> None:
    output = label("--compare", "latest", "--pairs", "12", "--campaign", "x")
    (found,) = comparisons_of(campaign)
    assert output.splitlines()[0] == (
        f"blind comparison {found.id[:4]}: round 2 against the base of campaign x, "
        "12 pairs of 8 held-out prompts; 0 done"
    )
    assert "ann: http://127.0.0.1:8700/enter?key=" in output
    assert "the page runs already" in output


def test_the_page_of_up_is_found_on_the_port_that_up_was_given(campaign: Path) -> None:
    (campaign.parents[1] / "servers").mkdir()
    write_state({"ports": {"prefect": 4900, "mlflow": 5900, "label": 8790}})
    assert "ann: http://127.0.0.1:8790/enter?key=" in label()
    assert "ann: http://127.0.0.1:8701/enter?key=" in label("--port", "8701")


def test_the_same_command_again_says_how_far_it_is(campaign: Path) -> None:
    words = ("--compare", "2", "--against", "1", "--pairs", "5", "--raters-per-pair", "1", "--campaign", "x")
    label(*words)
    (found,) = comparisons_of(campaign)
    say_all(campaign, found, lambda _: 0)
    assert "round 2 against round 1 of campaign x, 5 pairs of 5 held-out prompts; 5 done" in label(*words)
    assert comparisons_of(campaign) == [found]


def test_images_that_are_gone_are_counted(campaign: Path) -> None:
    (campaign / "images/round=0/r0-e0.png").unlink()
    output = label("--compare", "1", "--campaign", "x")
    assert "23 pairs of 8 held-out prompts" in output
    assert "1 pairs cannot be asked: their images are no longer on disk" in output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--compare", "9"), "'9' is no finished round of campaign 'x'"),
        (("--compare", "base"), "round 0 is the base model"),
        (("--compare", "1", "--against", "1"), "cannot be compared with itself"),
        (("--against", "1"), "add --compare ROUND"),
    ],
)
def test_what_cannot_be_compared_is_one_line_and_no_page(campaign: Path, words: tuple[str, ...], message: str) -> None:
    with pytest.raises(D3POError, match=message) as caught:
        label(*words, "--campaign", "x")
    assert "\n" not in str(caught.value)


def test_without_it_nothing_is_begun(campaign: Path) -> None:
    label()
    assert comparisons_of(campaign) == []


def test_what_people_say_is_told_to_mlflow(campaign: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(delivery, "deliver_comparisons", lambda config: told.append(config.campaign))
    label_command._compared("x", 1)
    assert told == ["x"]
