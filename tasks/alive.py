"""Keep a living run Running, even if a worker reports late that an earlier process of it was killed.

Prefect's worker reports a killed process twice. The second report waits until the worker has imported the flow, which
took 37 s on a busy machine. If the run was retried meanwhile, Prefect then shows it as Crashed, gives its place in the
deployment's queue away, and can no longer suspend it.
"""

import contextlib
import threading
from collections.abc import Iterator
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.runtime import flow_run
from prefect.states import Running

from d3po.tasks.logs import run_logger

LOOK_SECONDS = 5.0


@contextlib.contextmanager
def counts_as_running() -> Iterator[None]:
    """Within this context, the flow run becomes Running again whenever somebody reports a crash."""
    over, run_id, log = threading.Event(), flow_run.id, run_logger()

    def look() -> None:
        while not over.wait(LOOK_SECONDS):
            with contextlib.suppress(Exception):  # other code reports a server that is down
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
    """Set a Crashed run of this process to Running; return whether it was Crashed."""
    with get_client(sync_client=True) as client:
        state = client.read_flow_run(run_id).state
        if state is None or not state.is_crashed():
            return False
        client.set_flow_run_state(run_id, Running(), force=True)
        return True
