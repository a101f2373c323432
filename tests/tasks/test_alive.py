"""A late report of a crash does not stay with a run that lives."""

import asyncio
import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import prefect.workers.base
import pytest
from prefect.states import Completed, Crashed, Paused, Running, State
from prefect.workers.process import ProcessWorker

from d3po.tasks import alive
from d3po.tasks.worker import SECOND_REPORT, Worker

RUN = UUID(int=1)


class Server:
    """What Prefect's server knows of one run."""

    def __init__(self) -> None:
        self.state: State[Any] = Running()
        self.changed = threading.Event()

    @contextmanager
    def client(self, **_: Any) -> Iterator[Any]:
        yield SimpleNamespace(read_flow_run=lambda _: self, set_flow_run_state=self._set)

    def _set(self, run_id: UUID, state: State[Any], force: bool) -> None:
        assert (run_id, force) == (RUN, True)
        self.state = state
        self.changed.set()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    server = Server()
    monkeypatch.setattr(alive, "get_client", server.client)
    monkeypatch.setattr(alive, "LOOK_SECONDS", 0.01)
    monkeypatch.setenv("PREFECT__RUNTIME__FLOW_RUN__ID", str(RUN))
    return server


def test_a_living_run_that_is_said_to_have_crashed_is_running_again(server: Server) -> None:
    with alive.counts_as_running():
        server.state = Crashed()
        assert server.changed.wait(10)
        assert server.state.is_running()
        server.state = Crashed()  # at the last moment: its final state would be the crash's
    assert server.state.is_running()


@pytest.mark.parametrize("state", [Running(), Paused(), Completed()])
def test_any_other_state_is_left_alone(server: Server, state: State[Any]) -> None:
    server.state = state
    assert not alive.revive(RUN)
    assert server.state is state


def test_a_server_that_is_away_ends_nothing(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(**_: Any) -> Any:
        server.changed.set()
        raise OSError("away")

    monkeypatch.setattr(alive, "get_client", away)
    with alive.counts_as_running():
        assert server.changed.wait(10)


def test_the_worker_leaves_out_the_report_that_prefect_s_runner_made_already(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    async def propose(self: Any, flow_run: Any, message: str, client: Any = None) -> None:
        said.append(message)

    monkeypatch.setattr(ProcessWorker, "_propose_crashed_state", propose)
    worker = Worker.__new__(Worker)
    for message in (f"{SECOND_REPORT} -9. Killed.", "Failed to submit flow run to infrastructure: OSError: no disk"):
        asyncio.run(worker._propose_crashed_state(None, message))
    assert said == ["Failed to submit flow run to infrastructure: OSError: no disk"]
    words = inspect.getsource(prefect.workers.base).replace('"\n                    f"', "")
    assert SECOND_REPORT in words.replace('"\n                f"', "")  # as the pinned version of Prefect says it
