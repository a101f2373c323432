"""Report a Prefect server that does not answer ``d3po run``, or refuses it, in one line without a traceback."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import httpx

from d3po.flows.interrupting import flow_run_id, this_command
from d3po_core.errors import D3POError
from d3po_core.store.goals import has_goal
from d3po_core.store.stages import last_finished_round
from d3po_core.urls import masked

START = "; start it, or unset PREFECT_API_URL"


def require_prefect() -> None:
    """Check that the server answers and accepts the login, before any computation.

    Raises:
        D3POError: it does not answer, or refuses.
    """
    from prefect.client.orchestration import get_client

    with _in_one_line(""), get_client(sync_client=True) as client:
        client.read_flow_runs(limit=1)


@contextlib.contextmanager
def prefect_may_die(campaign: Path) -> Iterator[None]:
    """Within this context, a Prefect server that goes away ends the run with one line.

    If all rounds are finished, the run has succeeded even if Prefect could not be told.

    Raises:
        D3POError: rounds are left to do.
    """
    before = last_finished_round(campaign)
    try:
        with _in_one_line(f"; finished stages are kept. To go on, type again: {this_command()}"):
            yield
    except D3POError as error:
        if last_finished_round(campaign) == before or _is_left(campaign, flow_run_id()):
            raise
        print(f"all rounds are finished; Prefect was not told so: {str(error).partition(';')[0]}")


def _is_left(campaign: Path, run: UUID | None) -> bool:
    return run is None or has_goal(campaign, str(run))


@contextlib.contextmanager
def _in_one_line(hint: str) -> Iterator[None]:
    url = masked(os.environ.get("PREFECT_API_URL", "of this run"))
    try:
        yield
    except httpx.HTTPStatusError as error:
        code = error.response.status_code
        login = "; it wants a login: set PREFECT_API_AUTH_STRING (or PREFECT_API_KEY)" if code in (401, 403) else ""
        raise D3POError(f"the Prefect server {url} answers with {code}{login}{hint}") from None
    except (httpx.HTTPError, OSError, RuntimeError) as error:  # Prefect raises RuntimeErrors for these
        reason = masked(" ".join(str(error).split())[:300]) or type(error).__name__
        raise D3POError(f"the Prefect server {url} does not answer ({reason}){hint or START}") from None
