"""`d3po campaigns` over real campaigns, and deleting one."""

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from d3po.flows.commands.line import app
from d3po_core.errors import CampaignBusyError, D3POError
from d3po_core.store.campaign import campaign_lock
from d3po_core.store.stages import finished_rounds


@pytest.fixture
def runs(campaign: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of two campaigns: `tiny`, and `other` that has not begun."""
    monkeypatch.setenv("D3PO_DATA", str(campaign.parent.parent))
    (campaign.parent / "other").mkdir()
    shutil.copy(campaign / "campaign.json", campaign.parent / "other")
    return campaign.parent


def listed() -> dict[str, dict[str, Any]]:
    done = CliRunner().invoke(app, ["campaigns", "--json"])
    assert done.exit_code == 0, (done.output, done.exception)
    return {found["campaign"]: found for found in map(json.loads, done.stdout.splitlines())}


def test_campaigns_are_listed_with_what_their_files_say(runs: Path) -> None:
    found = listed()
    assert list(found) == ["other", "tiny"]
    last = finished_rounds(runs / "tiny")[-1]
    assert (found["tiny"]["rounds"], found["tiny"]["scorer"]) == (2, "brightness")
    assert found["tiny"]["score"] == last.score.mean
    assert found["tiny"]["bytes"] == sum(path.stat().st_size for path in (runs / "tiny").rglob("*") if path.is_file())
    assert datetime.fromisoformat(found["tiny"]["changed"]) <= datetime.now(UTC)
    assert (found["other"]["rounds"], found["other"]["score"], found["other"]["waits_for"]) == (-1, None, None)
    table = CliRunner().invoke(app, ["campaigns"]).stdout
    assert f"{last.score.mean:.3f}" in table
    assert "none" in table


def test_a_damaged_campaign_does_not_hide_the_others(runs: Path) -> None:
    (runs / "other" / "campaign.json").write_text("{")
    found = listed()
    assert found["other"]["problem"].startswith(str(runs / "other" / "campaign.json"))
    assert found["tiny"]["rounds"] == 2
    assert CliRunner().invoke(app, ["campaigns", "delete", "other", "--yes"]).exit_code == 0
    assert list(listed()) == ["tiny"]


def test_no_campaign_is_a_line_that_says_how_to_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("D3PO_DATA", str(tmp_path))
    assert "d3po run round" in CliRunner().invoke(app, ["campaigns"]).stdout


def test_delete_asks_and_deletes_that_folder_alone(runs: Path) -> None:
    no = CliRunner().invoke(app, ["campaigns", "delete", "tiny"], input="n\n")
    assert "2 rounds" in no.output
    assert isinstance(no.exception, D3POError)
    assert (runs / "tiny" / "campaign.json").exists()
    (runs.parent / "mlflow").mkdir()
    yes = CliRunner().invoke(app, ["campaigns", "delete", "tiny"], input="y\n")
    assert yes.exit_code == 0, (yes.output, yes.exception)
    assert [path.name for path in runs.iterdir()] == ["other"]
    assert (runs.parent / "mlflow").is_dir()


def test_nothing_of_a_deleted_campaign_is_left_whatever_it_holds(runs: Path) -> None:
    (runs / "other" / "campaign.json").unlink()
    (runs / "other" / "campaign.json").mkdir()
    done = CliRunner().invoke(app, ["campaigns", "delete", "other", "--yes"])
    assert done.exit_code == 0, done.exception
    assert [path.name for path in runs.iterdir()] == ["tiny"]


def test_a_campaign_in_use_and_a_link_are_refused(runs: Path, tmp_path: Path) -> None:
    with campaign_lock(runs / "tiny", who="test"):
        done = CliRunner().invoke(app, ["campaigns", "delete", "tiny", "--yes"])
    assert isinstance(done.exception, CampaignBusyError)
    (runs / "linked").symlink_to(runs / "tiny")
    done = CliRunner().invoke(app, ["campaigns", "delete", "linked", "--yes"])
    assert "is a link" in str(done.exception)
    done = CliRunner().invoke(app, ["campaigns", "delete", f"{runs}/linked/", "--yes"])
    assert "is a link" in str(done.exception)
    assert (runs / "tiny" / "campaign.json").exists()
    assert finished_rounds(runs / "tiny")
