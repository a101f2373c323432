"""Skip missed nights: when a machine wakes, all its runs are due, and only the last one is done."""

from datetime import UTC, datetime
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterExpectedStartTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.runtime import flow_run


def later_night() -> str | None:
    """Name of a later scheduled run of this deployment that is due too; None if there is none.

    Also None for a run that somebody asked for, or that had begun before: those are always done.
    """
    if not flow_run.id:
        return None
    with get_client(sync_client=True) as client:
        this = client.read_flow_run(UUID(flow_run.id))
        if not this.auto_scheduled or this.deployment_id is None or this.run_count > 1:
            return None
        due = FlowRunFilterExpectedStartTime(after_=this.expected_start_time, before_=datetime.now(UTC))
        scheduled = FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED]))
        of_this = FlowRunFilterDeploymentId(any_=[this.deployment_id])
        found = client.read_flow_runs(
            flow_run_filter=FlowRunFilter(deployment_id=of_this, state=scheduled, expected_start_time=due)
        )
    return _last(this, found)


def _last(this: FlowRun, found: list[FlowRun]) -> str | None:
    nights = [run for run in found if run.auto_scheduled and run.id != this.id and run.run_count == 0]
    return max(nights, key=lambda run: run.expected_start_time).name if nights else None
