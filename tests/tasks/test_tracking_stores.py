"""Stores that were deleted from, moved or changed: MLflow ends with everything, and nothing is written elsewhere."""

import os
import shutil
import sqlite3
import stat
from collections import OrderedDict
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.entities import Run
from mlflow.tracking._tracking_service import utils

from d3po.tasks.tracking import delivery
from d3po.tasks.tracking.registry import (
    describe_version,
    log_checkpoint,
    register_version,
    registered_name,
    set_aliases,
)
from d3po.tasks.tracking.store import campaign_run_id, experiment, forget_runs, mlflow_client, page_url, round_run_id
from d3po_core.config import CampaignConfig


@pytest.fixture
def own(own: CampaignConfig, tmp_path: Path, new_store: Path) -> CampaignConfig:
    """The same, with a second store beside the data folder's own."""
    shutil.copy(new_store, tmp_path / "other.db")
    return own


def runs(client: MlflowClient) -> dict[str, Run]:
    experiment = client.get_experiment_by_name("d3po")
    return {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}


def values(client: MlflowClient) -> dict[str, tuple[dict[str, float], list[str]]]:
    """What each run holds: metrics, and names of artifacts."""
    return {
        name: (run.data.metrics, sorted(file.path for file in client.list_artifacts(run.info.run_id)))
        for name, run in runs(client).items()
    }


def test_a_deleted_experiment_is_restored_and_gets_what_it_missed(
    own: CampaignConfig, caplog: pytest.LogCaptureFixture
) -> None:
    delivery.deliver(own)
    client = mlflow_client()
    before = values(client)
    client.delete_experiment(client.get_experiment_by_name("d3po").experiment_id)
    for mark in own.folder.glob("stages/round=2/*.delivered"):
        mark.unlink()
    delivery.deliver(own)  # what a process remembers of a run that was deleted costs one delivery
    delivery._left_alone_until.clear()
    delivery.deliver(own)
    assert values(client) == before
    assert "was deleted and is restored" in caplog.text
    assert not tracking_misses(own)


def test_a_deleted_campaign_run_is_restored(own: CampaignConfig) -> None:
    delivery.deliver(own)
    client = mlflow_client()
    before = values(client)
    client.delete_run(campaign_run_id(own))
    forget_runs()
    delivery.deliver(own)
    assert values(client) == before


def test_a_campaign_that_is_gone_for_good_is_told_whole_again(own: CampaignConfig) -> None:
    delivery.deliver(own)
    client = mlflow_client()
    before = values(client)
    store = client._tracking_client.store
    for run in runs(client).values():  # as `mlflow gc` does with runs that were deleted
        store._hard_delete_run(run.info.run_id)
    forget_runs()
    delivery.deliver(own)
    assert values(client) == before


def test_each_store_gets_everything_whatever_another_was_told(
    own: CampaignConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    delivery.deliver(own)
    first = mlflow_client()
    kept = values(first)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/other.db")
    monkeypatch.chdir(tmp_path)
    delivery.deliver(own)
    assert list(values(mlflow_client()))
    assert values(mlflow_client()).keys() == kept.keys()
    assert {n: m for n, (m, _) in values(mlflow_client()).items()} == {n: m for n, (m, _) in kept.items()}
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    asked: list[Any] = []
    monkeypatch.setitem(delivery.LOGGERS, "evaluate", lambda *call: asked.append(call))
    delivery.deliver(own)
    assert not asked


def test_marks_of_an_earlier_version_count_for_the_store_that_has_the_campaign(
    own: CampaignConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    delivery.deliver(own)
    marks = list(own.folder.glob("stages/*/*.delivered"))
    asked: list[str] = []
    for mark in marks:
        mark.write_text("")
    for name in delivery.LOGGERS:
        monkeypatch.setitem(delivery.LOGGERS, name, lambda *call, name=name: asked.append(name))
    delivery.deliver(own)
    assert not asked
    for mark in marks:
        mark.write_text("")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/other.db")
    delivery.deliver(own)
    assert len(asked) == len(marks)


def test_a_copied_data_folder_is_written_where_it_lies_now(
    own: CampaignConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    delivery.deliver(own)
    version = registered(own, 1)
    described = f"loaded from {tmp_path}/data/mlflow/mlflow.db"
    describe_version(mlflow_client(), own, round_run_id(own, 1), version, described)
    shutil.copytree(tmp_path / "data", tmp_path / "moved data")
    old = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")}
    monkeypatch.setenv("D3PO_DATA", str(tmp_path / "moved data"))
    # As in another process: MLflow sets the variable itself, and remembers where it wrote.
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.setattr(utils, "_artifact_repos_cache", OrderedDict())
    forget_runs()
    for mark in own.folder.glob("stages/round=2/*.delivered"):
        mark.unlink()
    delivery.deliver(own)
    client = mlflow_client()
    moved = (tmp_path / "moved data" / "mlflow" / "artifacts").as_uri()
    for run in runs(client).values():
        assert run.info.artifact_uri.startswith(f"{moved}/")
        client.log_text(run.info.run_id, "new", "new.txt")
    path = Path(download_artifacts(f"models:/{registered_name(own)}/{version}"))
    assert (path / "weights").read_text() == "of round 1"
    assert registered(own, 2) == "2"
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "data").rglob("*")} == old
    with sqlite3.connect(tmp_path / "moved data" / "mlflow" / "mlflow.db") as store:
        everything = "\n".join(store.iterdump())
    assert f"{tmp_path}/data/mlflow" not in everything


def test_artifacts_that_were_kept_elsewhere_stay_there(own: CampaignConfig, tmp_path: Path) -> None:
    client = mlflow_client()
    client.create_experiment("d3po", artifact_location=(tmp_path / "elsewhere").as_uri())
    delivery.deliver(own)
    mlflow_client()
    assert {Path(run.info.artifact_uri).parts[-3] for run in runs(client).values()} == {"elsewhere"}


def test_a_deleted_registered_model_gets_its_earlier_versions_again(own: CampaignConfig) -> None:
    delivery.deliver(own)
    client, name = mlflow_client(), registered_name(own)
    registered(own, 1)
    registered(own, 2)
    set_aliases(client, own, {"champion": 1})
    client.delete_registered_model(name)
    registered(own, 2)
    set_aliases(client, own, {"champion": 1, "current": 2})
    versions = {v.tags["round"]: v for v in client.search_model_versions(f"name = '{name}'")}
    assert versions.keys() == {"1", "2"}
    assert client.get_model_version_by_alias(name, "champion").version == versions["1"].version


def test_copies_of_files_are_as_readable_as_the_umask_says(own: CampaignConfig, tmp_path: Path) -> None:
    delivery.deliver(own)
    registered(own, 1)
    files = [path for path in (tmp_path / "data" / "mlflow" / "artifacts").rglob("*") if path.is_file()]
    umask = os.umask(0)
    os.umask(umask)
    assert files
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~umask}


def test_a_password_of_the_store_is_in_no_line_and_no_page(
    own: CampaignConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://ann:s3cret@127.0.0.1:1/mlflow?token=t0ken")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    delivery.deliver(own)
    assert "did not take" in caplog.text
    assert "s3cret" not in caplog.text
    assert "t0ken" not in caplog.text
    assert page_url() == "http://127.0.0.1:1/mlflow"


def registered(config: CampaignConfig, number: int) -> str:
    """Register a checkpoint as a round does; gives its version."""
    client, run = mlflow_client(), round_run_id(config, number)
    folder = config.folder / f"checkpoint of {number}"
    folder.mkdir(exist_ok=True)
    (folder / "weights").write_text(f"of round {number}")
    tags, when = {"round": str(number)}, datetime(2026, 5, 1)
    model = log_checkpoint(client, config, number, run, f"round {number}", folder, tags, {"held_out/x": 1.0}, when)
    return register_version(client, config, model, tags)


def tracking_misses(config: CampaignConfig) -> list[Path]:
    return [p for p in config.folder.glob("stages/*/evaluate.json") if not p.with_suffix(".delivered").exists()]


def test_a_data_folder_with_an_odd_name_gets_no_folder_beside_it(
    new_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd, here = tmp_path / "da?ta #1 50%", tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("D3PO_DATA", str(odd))
    (odd / "mlflow").mkdir(parents=True)
    shutil.copy(new_store, odd / "mlflow")
    client = mlflow_client()
    found = client.get_experiment(experiment(client))
    assert found.artifact_location == (odd / "mlflow" / "artifacts").as_uri()
    assert list(here.iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([odd.name, "here"])
    with sqlite3.connect(odd / "mlflow" / "mlflow.db") as database:
        assert ("d3po",) in database.execute("SELECT name FROM experiments").fetchall()
