"""The flow ``wake``: resume a waiting run at its deadline, so that it applies its policy."""

from prefect import flow
from prefect.states import Completed, State

from d3po.tasks.waiting import wake as wake_run


# A deadline comes only once, so retry while the run is about to sleep or the server does not answer.
@flow(name="wake", flow_run_name="{campaign}: deadline of round {round_number}", persist_result=False,
      retries=30, retry_delay_seconds=10)  # fmt: skip
def wake(campaign: str, round_number: int, flow_run_id: str) -> State:
    """Resume the run that waits for a round; do nothing if it no longer waits.

    Args:
        campaign: the campaign's name.
        round_number: the round.
        flow_run_id: the run that asked to be woken; only for readers.
    """
    wake_run(campaign, round_number)
    return Completed(message=f"round {round_number} of campaign {campaign} does not wait any more")
