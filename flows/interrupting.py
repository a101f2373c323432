"""Make Ctrl-C end ``d3po run`` within seconds, with one line and no loss on disk."""

import contextlib
import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any, NoReturn
from uuid import UUID

from rich.console import Console

from d3po.tasks.live_line import take_away

TELL_PREFECT_SECONDS, DRAW_SECONDS = 2.0, 0.5
INTERRUPTED = 130  # the exit status that shells expect after Ctrl-C

_flow_runs: list[UUID] = []


@contextlib.contextmanager
def ctrl_c_ends_it() -> Iterator[None]:
    """Within this context, Ctrl-C ends the process from a separate thread.

    An exception in the main thread would have to wait for its current work: a long matrix product, a pool of threads
    that asks a server, Prefect's retries. Python writes the signal's number to a pipe at once, so the thread can act.
    Killing is safe at any point: a round on disk is made for it.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # in a script's background, or under nohup
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    threading.Thread(target=_wait_for_it, args=(reading,), name="ctrl-c", daemon=True).start()
    before = signal.signal(signal.SIGINT, lambda *_: None), signal.set_wakeup_fd(writing)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before[1])
        signal.signal(signal.SIGINT, before[0])
        os.close(writing)


def note_flow_run(flow: Any, flow_run: Any, state: Any) -> None:
    """Remember the run to mark on Ctrl-C; Prefect calls this hook when the run begins."""
    _flow_runs.append(flow_run.id)


def flow_run_id() -> UUID | None:
    """The run that ``note_flow_run`` saw last."""
    return _flow_runs[-1] if _flow_runs else None


def end_here(said: str, status: int) -> NoReturn:
    """Print one line, tell Prefect that the run is over, and end the process.

    Prefect has ``TELL_PREFECT_SECONDS`` to answer.
    """
    import logging

    logging.disable()
    if flow_run := flow_run_id():
        teller = threading.Thread(target=_tell_prefect, args=(flow_run, said), daemon=True)
        teller.start()
        teller.join(TELL_PREFECT_SECONDS)
    remover = threading.Thread(target=take_away, daemon=True)  # the main thread may be drawing
    remover.start()
    remover.join(DRAW_SECONDS)
    Console(stderr=True).show_cursor()  # the live line hides it
    print(f"\nd3po: {said}; to go on where it stopped, type again: {this_command()}", file=sys.__stderr__, flush=True)
    os._exit(status)


def this_command() -> str:
    """The command as the user typed it."""
    return shlex.join(["d3po", *sys.argv[1:]])


def _wait_for_it(descriptor: int) -> None:
    while number := os.read(descriptor, 1):
        if number[0] == signal.SIGINT:
            end_here("stopped", INTERRUPTED)
    os.close(descriptor)


def _tell_prefect(flow_run: UUID, said: str) -> None:
    from prefect.client.orchestration import get_client
    from prefect.states import Cancelled

    with contextlib.suppress(Exception), get_client(sync_client=True) as client:
        client.set_flow_run_state(flow_run, Cancelled(message=said), force=True)
