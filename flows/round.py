"""The flow ``d3po``: sample, judge, wait for people, derive, train, evaluate, guard, publish; N rounds."""

from prefect import flow, get_run_logger
from prefect.runtime import flow_run
from prefect.states import Cancelled, Completed, Failed, State

from d3po.flows.presets import over_deployment
from d3po.tasks.alive import counts_as_running
from d3po.tasks.evaluating import evaluate_checkpoint
from d3po.tasks.guarding import guard_round, require_trust
from d3po.tasks.judging import derive_pairs, judge_images
from d3po.tasks.nights import later_night
from d3po.tasks.publishing import check_campaign, plan_rounds, publish_round
from d3po.tasks.round_line import campaign_line, round_line
from d3po.tasks.sampling import sample_images
from d3po.tasks.training import train_policy
from d3po.tasks.waiting import require_deployment, wait_for_people
from d3po_core.config import CampaignConfig
from d3po_core.errors import D3POError
from d3po_core.models.model_files import with_model_defaults
from d3po_core.processes.pool import ranks_end_here
from d3po_core.store.campaign import begin_round, campaign_lock
from d3po_core.store.goals import end_run


@flow(name="d3po", flow_run_name="{config.campaign}", persist_result=False, validate_parameters=True)
def d3po(config: CampaignConfig = CampaignConfig(), rounds: int = 1) -> State:  # noqa: B008 (frozen)
    """Run more rounds of a campaign after its last finished one; start the campaign if it is new.

    If a run is killed, a retry or the same command again ends at the first run's target round.

    Args:
        config: the campaign's configuration; in a deployment, only what differs from the deployment's values.
        rounds: how many rounds to add.
    """
    logger = get_run_logger()
    if stands_in := later_night():
        return Cancelled(message=f"missed; a later scheduled run stands for it: {stands_in}")
    try:
        config = with_model_defaults(over_deployment(config))
        for warning in check_campaign(config):
            logger.warning(warning)
        busy = campaign_lock(config.folder, who=f"flow run {flow_run.name}")
        with busy, ranks_end_here(), counts_as_running():
            numbers = plan_rounds(config, rounds, run_id=str(flow_run.id))
            require_deployment(config, numbers)
            for number in numbers:
                require_trust(config, number - 1)
                begin_round(config, number)
                if number > 0:  # round 0 is the base model: only evaluated
                    sample_images(config, number)
                    judge_images(config, number)
                    wait_for_people(config, number)  # with labeller 'human' or 'mixed', the run sleeps here
                    derive_pairs(config, number)
                    train_policy(config, number)
                evaluate_checkpoint(config, number)
                guard_round(config, number)
                finished = publish_round(config, number)
                logger.info("%s", round_line(config, finished))
            end_run(config.folder, run_id=str(flow_run.id))
    except D3POError as error:
        # The user can fix it: one line, no traceback.
        return Failed(message=str(error))
    return Completed(message=campaign_line(config, numbers))
