"""The commands that ask a campaign and make things again, on a campaign that the stages of a run made."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner, Result

from d3po.flows.commands.again import prune, regenerate, replay
from d3po.flows.commands.ask import query, show
from d3po.flows.commands.export import export_lora, export_preferences
from d3po_core.errors import CampaignBusyError, D3POError
from d3po_core.store.campaign import campaign_lock
from d3po_core.store.images import load_png, save_png
from d3po_core.store.tables import partition, read_rows, table_from_rows, write_table

Command = Callable[..., Result]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def command(campaign: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Command]:
    """Run a command on a copy of the campaign, as the command line would."""
    monkeypatch.setenv("D3PO_DATA", str(campaign.parent.parent))
    monkeypatch.setenv("COLUMNS", "200")
    app = typer.Typer(pretty_exceptions_enable=False)
    for function in (query, show, regenerate, replay, prune, export_preferences, export_lora):
        app.command()(function)

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(app, [*arguments])

    yield run
    torch.set_num_threads(1)


def test_command_regenerate_writes_the_image(command: Command, campaign: Path, tmp_path: Path) -> None:
    done = command("regenerate", "r2-e3", "--campaign", "tiny", "--output", str(tmp_path / "again.png"))
    assert done.exit_code == 0, done.output
    assert "r2-e3: identical: the same bytes as the stored file" in done.output
    assert (tmp_path / "again.png").read_bytes() == (campaign / "images/round=2/r2-e3.png").read_bytes()
    inside = command("regenerate", "r2-e3", "--campaign", "tiny", "--output", str(campaign / "images/x.png"))
    assert isinstance(inside.exception, D3POError)
    assert "lies in the campaign's own folder" in str(inside.exception)


def test_command_regenerate_fails_beyond_its_tolerance(command: Command, campaign: Path) -> None:
    path = campaign / "images/round=1/r1-g0-m0.png"
    save_png(load_png(path) ^ 16, path)
    within = command("regenerate", "r1-g0-m0", "--campaign", "tiny", "--tolerance", "16")
    assert within.exit_code == 0, within.output
    assert "largest pixel difference 16 of 255, tolerance 16" in within.output
    beyond = command("regenerate", "r1-g0-m0", "--campaign", "tiny")
    assert isinstance(beyond.exception, D3POError)
    assert "differs from the stored image by up to 16 of 255" in str(beyond.exception)


def test_command_replay_uses_the_recorded_threads_or_says_what_it_used(command: Command, campaign: Path) -> None:
    torch.set_num_threads(2)
    same = command("replay", "tiny", "--round", "2")
    assert same.exit_code == 0, same.output
    assert "round 2: the same weights, byte for byte" in same.output
    (row,) = read_rows(partition(campaign, "rounds", 2) / "part.parquet")
    write_table(campaign, "rounds", 2, table_from_rows("rounds", [row | {"lora_sha256": "0" * 64}]))
    other = command("replay", "tiny", "--threads", "2")
    assert other.exit_code == 1
    assert "round 2: other weights" in other.output
    assert re.search(r"computed on cpu, 2 CPU threads, .*the round on cpu, 1 CPU threads", other.output, re.S)
    base = command("replay", "tiny", "--round", "0")
    assert "0 is the base model, not a round that trained; name another: 1, 2" in str(base.exception)


def test_command_prune_waits_for_nobody_and_a_dry_run_changes_nothing(command: Command, campaign: Path) -> None:
    before = contents(campaign)
    dry = command("prune", "--campaign", "tiny", "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert re.search(r"trajectories\W+6\W+\d+\.\d\W+6\W", dry.output)
    assert contents(campaign) == before
    with campaign_lock(campaign, who="a round"):
        busy = command("prune", "--campaign", "tiny")
    assert isinstance(busy.exception, CampaignBusyError)
    assert {name: content for name, content in contents(campaign).items() if name != ".lock"} == before
    assert "dropped" in command("prune", "--campaign", "tiny", "--keep-rounds", "1").output
    assert [path.name for path in (campaign / "trajectories").iterdir()] == ["round=2"]


def test_commands_show_query_and_export_answer(command: Command, tmp_path: Path) -> None:
    shown = command("show", "r2-g0-m0", "--campaign", "tiny")
    assert shown.exit_code == 0, shown.output
    assert re.search(r"checkpoint +checkpoints/round=1", shown.output)
    asked = command("query", "SELECT count(*) AS n FROM checkpoints", "--campaign", "tiny", "--format", "json")
    assert json.loads(asked.output) == {"n": 3}
    wrong = command("query", "SELECT nope FROM pairs", "--campaign", "tiny")
    assert isinstance(wrong.exception, D3POError)
    assert "\n" not in str(wrong.exception)
    for name in ("export-preferences", "export-lora"):
        done = command(name, "--campaign", "tiny", "--output", str(tmp_path / name))
        assert done.exit_code == 0, done.output
        assert (tmp_path / name / "README.md").is_file()


def test_an_answer_is_shown_as_it_is(command: Command) -> None:
    def answer(sql: str, format: str) -> str:
        done = command("query", sql, "--campaign", "tiny", "--format", format)
        assert done.exit_code == 0, done.output
        return done.output

    # A prompt may hold anything; neither is this markup, nor an emoji.
    assert re.search(r"a \[red\] circle \[/\] +│ :smile:", answer("SELECT 'a [red] circle [/]', ':smile:'", "table"))
    # Whole numbers beside missing ones stay whole, and no digit is lost.
    exact = "SELECT unnest([9007199254740993, NULL]) AS n, 1 / 3 AS third, DATE '2020-01-31' AS day, [1, 2] AS list"
    row, other = (json.loads(line) for line in answer(exact, "json").splitlines())
    assert row == {"n": 9007199254740993, "third": 1 / 3, "day": "2020-01-31", "list": [1, 2]}
    assert other["n"] is None
    assert answer(exact, "csv").splitlines()[1] == '9007199254740993,0.3333333333333333,2020-01-31,"[1, 2]"'


@pytest.mark.parametrize("format", ["table", "csv", "json", "parquet"])
def test_answer_that_cannot_be_written_is_one_line_and_leaves_nothing(
    command: Command, tmp_path: Path, format: str
) -> None:
    asked = ("query", "SELECT 1 AS one", "--campaign", "tiny", "--format", format, "--output")
    (tmp_path / "file").touch()
    wrong = command(*asked, str(tmp_path / "file" / "answer"))
    assert isinstance(wrong.exception, D3POError)
    assert re.fullmatch("cannot write .*make its folder writable, or name another --output", str(wrong.exception))
    assert command(*asked, str(tmp_path / "new folder's" / "answer")).exit_code == 0
    assert (tmp_path / "new folder's" / "answer").stat().st_size


def test_damaged_table_is_one_line_that_names_the_file(command: Command, campaign: Path) -> None:
    (campaign / "samples/round=1/part.parquet").write_text("garbage")
    wrong = command("query", "SELECT count(prompt) FROM samples", "--campaign", "tiny")
    assert isinstance(wrong.exception, D3POError)
    assert "samples/round=1/part.parquet" in str(wrong.exception)
    assert "\n" not in str(wrong.exception)
