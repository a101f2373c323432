"""Suspend this flow run with a message; Prefect's own ``suspend_flow_run`` leaves the message empty."""

from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.exceptions import Abort, Pause
from prefect.input import RunInput, keyset_from_paused_state
from prefect.runtime import flow_run
from prefect.states import Suspended
from prefect.utilities.engine import propose_state_sync
from pydantic import Field


class GoOn(RunInput):
    """The form on Prefect's page when somebody resumes a run that waits for judgements."""

    go_on_with_what_is_there: bool = Field(
        False, description="Train on the judgements so far, even if some are missing"
    )


def suspend(message: str, key: str) -> GoOn:
    """Suspend this run, which ends its process; if this key was suspended before, return the answer to its form.

    Args:
        message: shown as the state's message.
        key: names this wait within the run.

    Raises:
        Pause: the run is suspended; Prefect ends the process.
        RuntimeError: the server does not allow it.
    """
    run_id, wanted = UUID(str(flow_run.id)), Suspended(pause_key=key, message=message)
    form = keyset_from_paused_state(wanted)
    wanted.state_details.run_input_keyset = form
    with get_client(sync_client=True) as client:
        try:
            state = propose_state_sync(client, wanted, flow_run_id=run_id)
        except Abort as refusal:
            raise RuntimeError(f"the run cannot be suspended: {refusal}") from None
    if state.is_running():  # resumed already
        return GoOn.load(form)
    if not state.is_paused():
        raise RuntimeError(f"the run cannot be suspended: it is {state.name}")
    GoOn.save(form)
    raise Pause(state=state)
