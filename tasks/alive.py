"""A run that lives is Running, whatever a worker reports late of the process that was killed before it.

Prefect's worker reports a killed process twice. The second report waits until the worker has imported the flow, which
took 37 s on a busy machine; a run that was retried meanwhile is then Crashed on Prefect's pages, its place in the
deployment's queue is given away, and it cannot be suspended any more.
"""

import contextlib
import threading
from collections.abc import Iterator
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.runtime import flow_run
from prefect.states import Running

from tasks.logs import run_logger

LOOK_SECONDS = 5.0


@contextlib.contextmanager
def counts_as_running() -> Iterator[None]:
    """Within this context the flow run becomes Running again whenever somebody says that it crashed."""
    over, run_id, log = threading.Event(), flow_run.id, run_logger()

    def look() -> None:
        while not over.wait(LOOK_SECONDS):
            with contextlib.suppress(Exception):  # a server that is away is somebody else's to report
                if revive(UUID(run_id)):
                    log.info("a late report said that this run crashed; it lives and goes on")

    watcher = threading.Thread(target=look, name="counts-as-running", daemon=True)
    if run_id:
        watcher.start()
    try:
        yield
    finally:
        over.set()
        if run_id:
            with contextlib.suppress(Exception):
                revive(UUID(run_id))


def revive(run_id: UUID) -> bool:
    """Make a run of this process Running that is Crashed; say whether it was."""
    with get_client(sync_client=True) as client:
        state = client.read_flow_run(run_id).state
        if state is None or not state.is_crashed():
            return False
        client.set_flow_run_state(run_id, Running(), force=True)
        return True
