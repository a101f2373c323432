"""Skip missed nights: if a machine or its worker was off, several scheduled runs are due, and one does them all."""

from datetime import UTC, datetime
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterExpectedStartTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.runtime import flow_run
from prefect.states import Cancelled


def skip_missed_nights() -> list[str]:
    """Cancel the other scheduled runs of this deployment that are due too, and return their names.

    It does nothing in a run that somebody asked for, and leaves such runs, retries and resumed runs alone.
    """
    if not flow_run.id:
        return []
    with get_client(sync_client=True) as client:
        this = client.read_flow_run(UUID(flow_run.id))
        missed = _missed_with(this, client)
        for run in missed:
            message = f"Missed; the scheduled run {this.name} does its work too."
            client.set_flow_run_state(run.id, Cancelled(message=message), force=True)
    return [run.name for run in missed]


def _missed_with(this: FlowRun, client: SyncPrefectClient) -> list[FlowRun]:
    if not this.auto_scheduled or this.deployment_id is None or this.run_count > 1:
        return []
    due = FlowRunFilterExpectedStartTime(before_=datetime.now(UTC))
    scheduled = FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED]))
    of_this = FlowRunFilterDeploymentId(any_=[this.deployment_id])
    found = client.read_flow_runs(
        flow_run_filter=FlowRunFilter(deployment_id=of_this, state=scheduled, expected_start_time=due)
    )
    return [run for run in found if run.auto_scheduled and run.id != this.id and run.run_count == 0]
