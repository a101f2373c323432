"""``d3po invite`` and ``d3po revoke``, the owner's link, and the lines on what waits in rounds, raters and status."""

import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from d3po.flows.commands.invite import invite, revoke
from d3po.flows.commands.raters import raters
from d3po.flows.commands.rounds import show_campaign
from d3po.flows.page_links import owner_line, waiting_lines
from d3po_core.config import CampaignConfig
from d3po_core.errors import D3POError
from d3po_core.page.access import Raters
from d3po_core.people.invitations import FILE, read_invitations
from d3po_core.store.goals import end_run, rounds_to_do, unfinished_goal
from d3po_core.store.stages import stage_path
from tests.core.people.labelling import waiting_campaign

app = typer.Typer(pretty_exceptions_enable=False)
for command in (invite, revoke, raters):
    app.command()(command)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CampaignConfig:
    monkeypatch.setenv("D3PO_DATA", str(tmp_path))
    monkeypatch.setenv("D3PO_LABEL_URL", "http://127.0.0.1:21699")
    return waiting_campaign(tmp_path, groups=4, pixels=1)


def d3po(*words: str) -> str:
    result = CliRunner().invoke(app, [*words, "--campaign", "x"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_links_that_it_prints_let_in(config: CampaignConfig, tmp_path: Path) -> None:
    lines = d3po("invite", "ann", "bob", "--quota", "3", "--assign", "split").splitlines()
    known = Raters(tmp_path)
    for name, line in zip(("ann", "bob"), lines, strict=False):
        assert line.startswith(f"{name}: http://127.0.0.1:21699/enter?key=")
        assert known.rater_of(line.rpartition("=")[2]) == name
    assert lines[2] == "campaign x: 2 invited; groups are dealt out evenly"
    assert {one.quota for one in read_invitations(config.folder).standing.values()} == {3}
    assert d3po("invite", "ann").splitlines()[0] == lines[0]  # the same link, and the quota stays
    assert read_invitations(config.folder).quota("ann") == 3


def test_a_revoked_link_is_dead(config: CampaignConfig, tmp_path: Path) -> None:
    token = d3po("invite", "ann").splitlines()[0].rpartition("=")[2]
    assert "the link no longer works" in d3po("revoke", "ann")
    assert Raters(tmp_path).rater_of(token) is None
    assert not read_invitations(config.folder).standing


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("invite",), "name a rater"),
        (("invite", "ann", "a/b"), "nobody was invited"),
        (("invite", "--assign", "split"), "nobody is invited"),
        (("revoke", "zoe"), "has no link"),
    ],
)
def test_what_cannot_be_done_is_one_line(config: CampaignConfig, words: tuple[str, ...], message: str) -> None:
    with pytest.raises(D3POError, match=message) as caught:
        d3po(*words)
    assert "\n" not in str(caught.value)
    assert not (config.folder / FILE).exists()


def test_the_owners_link_is_shown_in_a_terminal_only(
    config: CampaignConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "key=" not in owner_line()
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert owner_line() == f"Owner's page: http://127.0.0.1:21699/owner/enter?key={Raters(tmp_path).owner_token()}"


def test_commands_say_what_waits_and_for_whom(config: CampaignConfig, tmp_path: Path) -> None:
    waiting_campaign(tmp_path, "proxies", pixels=1, labeller="proxy")
    d3po("invite", "ann")
    line = "round 1 waits for people: 0 of 4 groups judged (4 answers missing); may judge the rest: ann (4)"
    assert waiting_lines(config.folder) == [line]
    assert waiting_lines() == [f"campaign x: {line}"]
    with pytest.raises(D3POError, match="round 1 waits for people"):
        show_campaign(config)
    with pytest.raises(D3POError, match="round 1 waits for people"):
        d3po("raters")


def test_a_campaign_in_its_first_round_is_not_told_to_start_another_run(config: CampaignConfig) -> None:
    stage_path(config.folder, 1, "sample").unlink()  # nothing waits for people yet
    with pytest.raises(D3POError, match=r"no finished round yet; type: d3po submit .* --rounds 3$"):
        show_campaign(config)
    rounds_to_do(config.folder, 5, "a")
    with pytest.raises(D3POError, match=r"a run has begun it; wait, or .* type: d3po submit .* --rounds 5$"):
        show_campaign(config)
    end_run(config.folder, "a")
    assert unfinished_goal(config.folder) is None


def test_a_campaign_that_cannot_be_read_does_not_hide_the_others(config: CampaignConfig, tmp_path: Path) -> None:
    other = waiting_campaign(tmp_path, "broken", pixels=1)
    (other.folder / FILE).write_text("{")
    broken, fine = waiting_lines()
    assert broken.startswith("campaign broken: ")
    assert "cannot be read" in broken
    assert fine.startswith("campaign x: round 1 waits")
