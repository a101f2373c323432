"""A tracking store that does not answer costs a run little, and gets everything later."""

import contextlib
import os
import socket
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from werkzeug.serving import make_server
from werkzeug.wrappers import Request, Response

from d3po.tasks.tracking import delivery
from d3po.tasks.tracking.store import mlflow_client
from d3po_core.config import CampaignConfig
from d3po_core.people.blind import begin_comparison
from tests.core.evaluation.compared import say, say_all


class Mute:
    """A server that takes connections and never answers."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.callers: list[socket.socket] = []
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            try:
                self.callers.append(self._socket.accept()[0])
            except OSError:
                return

    def close(self) -> None:
        for caller in self.callers:
            caller.close()
        self._socket.close()


@pytest.fixture
def mute(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mute]:
    server = Mute()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(delivery, "_left_alone_until", {})
    yield server
    server.close()


def test_a_store_that_does_not_answer_is_left_alone_for_a_while(
    mute: Mute, config: CampaignConfig, campaign: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    own = config.model_copy(update={"runs_dir": str(campaign.parent)})
    delivery.deliver(own)
    assert "did not take 6 finished stages" in caplog.text
    assert "they are kept and delivered with the next one" in caplog.text
    asked = len(mute.callers)
    assert asked >= 1
    delivery.deliver(own)
    assert delivery.known_run_id(own, 1) is None
    assert delivery.pages(own) == {}
    assert len(mute.callers) == asked
    (until,) = delivery._left_alone_until.values()
    monkeypatch.setattr(delivery.time, "monotonic", lambda: until)
    delivery.deliver(own)
    assert len(mute.callers) > asked


def test_a_store_that_answers_again_gets_what_it_missed(
    mute: Mute, config: CampaignConfig, campaign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = config.model_copy(update={"runs_dir": str(campaign.parent)})
    delivery.deliver(own)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    delivery.deliver(own)  # another address is no victim of the first
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("d3po")
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(run.data.tags["d3po.round"] for run in runs) == ["0", "1", "2", "campaign"]
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert all(run.info.start_time < run.info.end_time for run in runs)


def test_what_people_prefer_is_told_once_and_again_when_it_changed(
    config: CampaignConfig, campaign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    own = config.model_copy(update={"runs_dir": str(campaign.parent)})
    found = begin_comparison(campaign, 2, 0, pairs=12).comparison
    say_all(campaign, found, lambda _: 1)
    delivery.deliver_comparisons(own)  # MLflow knows nothing of the round yet: its run tells it first
    assert not (campaign / "comparisons" / "2-0.delivered").exists()
    delivery.deliver(own)
    client = MlflowClient(uri)
    name = "held_out/human_win_rate/base"

    def told(which: str) -> list[tuple[float, int]]:
        experiment = client.get_experiment_by_name("d3po")
        (run,) = client.search_runs([experiment.experiment_id], f"tags.`d3po.round` = '{which}'")
        return [(metric.value, metric.step) for metric in client.get_metric_history(run.info.run_id, name)]

    assert told("2") == told("campaign") == [(1.0, 2)]
    assert told("1") == []
    delivery.deliver(own)
    delivery.deliver_comparisons(own)
    assert told("2") == [(1.0, 2)]
    say(campaign, found, 0, -1, rater="bob")
    delivery.deliver_comparisons(own)
    assert [step for _, step in told("2")] == [2, 2]
    assert 0.9 < told("2")[1][0] < 1


def test_mlflow_s_own_patience_is_the_user_s_to_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    mlflow_client()
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "1"


class Guarded:
    """MLflow's server behind a login, as the Flask application that it is."""

    def __init__(self, folder: Path) -> None:
        from mlflow.server import app
        from mlflow.server.handlers import initialize_backend_stores

        initialize_backend_stores(
            f"sqlite:///{folder}/mlflow.db", f"sqlite:///{folder}/mlflow.db", str(folder / "files")
        )
        self._app, self.refused = app, 0
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Any:
        login = Request(environ).authorization
        if login is None or (login.username, login.password) != ("ann", "secret"):
            self.refused += 1
            return Response("who are you?", status=401)(environ, start_response)
        return self._app(environ, start_response)

    def close(self) -> None:
        self._server.shutdown()


def test_a_server_with_a_login_is_told_with_mlflows_variables(
    config: CampaignConfig, campaign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    server = Guarded(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    monkeypatch.setattr(delivery, "_left_alone_until", {})
    own = config.model_copy(update={"runs_dir": str(campaign.parent)})
    try:
        delivery.deliver(own)
        assert server.refused > 0
        assert "they are kept and delivered with the next one" in caplog.text
        monkeypatch.setattr(delivery, "_left_alone_until", {})
        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ann")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret")
        delivery.deliver(own)
    finally:
        server.close()
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("d3po")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert len(runs) == 4


def test_local_store_that_a_kill_left_half_made_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("D3PO_DATA", str(tmp_path / "what?now"))
    file = tmp_path / "what?now" / "mlflow" / "mlflow.db"
    file.parent.mkdir(parents=True)
    with contextlib.closing(sqlite3.connect(file)) as database:  # the first of MLflow's tables, and no other
        database.execute("CREATE TABLE experiments (experiment_id INTEGER PRIMARY KEY, name TEXT)")
    assert [found.name for found in mlflow_client().search_experiments()] == ["Default"]
    assert (file.parent / "mlflow.db.half-made").exists()
    before = file.stat().st_ino
    mlflow_client()
    assert file.stat().st_ino == before, "a whole one was made again"
    assert [path.name for path in tmp_path.iterdir()] == ["what?now"]
