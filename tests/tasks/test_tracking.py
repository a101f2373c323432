"""A tracking store that does not answer costs a run little, and gets everything later."""

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from d3po_core.config import CampaignConfig
from tasks import tracking
from tasks.tracking.store import mlflow_client


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
    monkeypatch.setattr(tracking, "_left_alone_until", {})
    yield server
    server.close()


def test_a_store_that_does_not_answer_is_left_alone_for_a_while(
    mute: Mute, config: CampaignConfig, campaign: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    own = config.model_copy(update={"runs_dir": str(campaign.parent)})
    tracking.deliver(own)
    assert "did not take 6 finished stages" in caplog.text
    assert "they are kept and delivered with the next one" in caplog.text
    asked = len(mute.callers)
    assert asked >= 1
    tracking.deliver(own)
    assert tracking.known_run_id(own, 1) is None
    assert tracking.pages(own) == {}
    assert len(mute.callers) == asked
    (until,) = tracking._left_alone_until.values()
    monkeypatch.setattr(tracking.time, "monotonic", lambda: until)
    tracking.deliver(own)
    assert len(mute.callers) > asked


def test_a_store_that_answers_again_gets_what_it_missed(
    mute: Mute, config: CampaignConfig, campaign: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = config.model_copy(update={"runs_dir": str(campaign.parent)})
    tracking.deliver(own)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    tracking.deliver(own)  # another address is no victim of the first
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("d3po")
    names = {run.info.run_name: run.info.status for run in client.search_runs([experiment.experiment_id])}
    assert names == dict.fromkeys(("campaign tiny", "tiny base", "tiny round 001", "tiny round 002"), "FINISHED")


def test_mlflow_s_own_patience_is_the_user_s_to_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", raising=False)
    mlflow_client()
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "77"
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "1"
