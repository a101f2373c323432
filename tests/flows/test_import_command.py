"""``d3po import`` and ``d3po export-sheet`` as commands, and the flow of the same options."""

import inspect
from functools import partial
from pathlib import Path

import pytest
import typer

from d3po.flows.commands import judgement_files as import_command
from d3po_core.config import CampaignConfig
from d3po_core.errors import D3POError
from d3po_core.store.tables import connect
from tests.core.sampled import sampled_campaign
from tests.flows.typing_commands import typed

app = typer.Typer()
app.command("import")(import_command.import_judgements)
app.command("export-sheet")(import_command.export_sheet)


@pytest.fixture
def campaign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CampaignConfig:
    monkeypatch.setenv("D3PO_DATA", str(tmp_path))
    return sampled_campaign(tmp_path / "runs", images=True)


run = partial(typed, app)


def num_judgements(campaign: CampaignConfig) -> int:
    with connect(campaign.folder) as connection:
        return connection.sql("SELECT count(*) FROM judgements WHERE rater_kind != 'proxy'").fetchall()[0][0]


def test_sheet_is_exported_filled_in_and_imported(campaign: CampaignConfig, tmp_path: Path) -> None:
    told = run("export-sheet", tmp_path / "sheet", "--mode", "mark_bad", "--rater", "anna")
    assert "16 images of round 3, 16 rows to fill in" in told
    table = tmp_path / "sheet" / "judgements.csv"
    table.write_text(table.read_text(encoding="utf-8-sig").replace(",,anna,", ",good,anna,"))
    assert "16 judgements by 1 rater" in run("import", table)
    assert num_judgements(campaign) == 16
    assert "nothing changed" in run("import", table)
    assert num_judgements(campaign) == 16


def test_bad_file_is_an_error_and_its_problems_lie_beside_it(campaign: CampaignConfig, tmp_path: Path) -> None:
    file = tmp_path / "labels.csv"
    file.write_text("sample_id,rating\n" + "".join(f"r3-g0-m0,bad{n}\n" for n in range(30)) + "r3-g0-m1,1\n")
    with pytest.raises(D3POError, match=r"labels.csv: 30 of 31 rows are wrong; correct them, or .*--accept-valid"):
        run("import", file, "--rater", "anna")
    assert len((tmp_path / "labels.csv.problems.txt").read_text().splitlines()) == 30
    assert num_judgements(campaign) == 0
    assert "left out: 30 wrong rows" in run("import", file, "--rater", "anna", "--accept-valid")
    assert num_judgements(campaign) == 1


def test_waiting_run_goes_on_only_after_an_import(
    campaign: CampaignConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resumed: list[tuple[str, int]] = []
    monkeypatch.setattr(
        import_command, "_resume_waiting", lambda config, number: resumed.append((config.campaign, number))
    )
    file = tmp_path / "labels.csv"
    file.write_text("sample_id,rating\nr2-g0-m0,1\n")
    run("import", file, "--rater", "anna", "--resume", "--dry-run")
    run("import", file, "--rater", "anna", "--dry-run")
    assert resumed == []
    run("import", file, "--rater", "anna", "--resume")
    assert resumed == [("shapes", 2)]
    file.write_text("sample_id,rating\nr2-g0-m0,x\n")
    with pytest.raises(D3POError):
        run("import", file, "--rater", "anna", "--resume")
    assert resumed == [("shapes", 2)]


def test_flow_takes_the_options_of_the_command() -> None:
    from d3po.flows.import_judgements import import_judgements

    command = set(inspect.signature(import_command.import_judgements).parameters)
    flow = set(inspect.signature(import_judgements.fn).parameters)
    assert flow == {{"round_number": "round"}.get(name, name) for name in command - {"report"}}


def test_flow_imports_and_fails_in_one_line(
    prefect_server: dict[str, str], campaign: CampaignConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from d3po.flows.import_judgements import import_judgements

    file = tmp_path / "labels.csv"
    with temporary_settings({PREFECT_API_URL: prefect_server["PREFECT_API_URL"]}):
        file.write_text("sample_id,rating\nr3-g0-m0,x\n")
        refused = import_judgements(str(file), rater="anna", return_state=True)
        assert (refused.name, refused.type.value) == ("Refused", "CANCELLED")
        assert "1 of 1 rows are wrong" in (refused.message or "")
        file.write_text("sample_id,rating\nr3-g0-m0,1\n")
        assert import_judgements(str(file), rater="anna", return_state=True).is_completed()
    assert num_judgements(campaign) == 1
