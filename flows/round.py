"""The flow ``d3po``: sample, judge, wait for people, derive, train, evaluate, guard, publish; N rounds."""

from prefect import flow, get_run_logger
from prefect.runtime import flow_run
from prefect.states import Completed, Failed, State

from d3po.flows.form import FormConfig
from d3po.flows.presets import over_deployment
from d3po.flows.refusing import refused
from d3po.tasks.alive import counts_as_running
from d3po.tasks.evaluating import evaluate_checkpoint
from d3po.tasks.guarding import guard_round, require_trust
from d3po.tasks.judging import derive_pairs, judge_images
from d3po.tasks.mirroring import mirrored
from d3po.tasks.nights import skip_missed_nights
from d3po.tasks.publishing import check_campaign, plan_rounds, publish_round
from d3po.tasks.reporting import current_at_the_end
from d3po.tasks.round_line import campaign_line, round_line
from d3po.tasks.run_names import name_run
from d3po.tasks.sampling import sample_images
from d3po.tasks.training import train_policy
from d3po.tasks.waiting import require_deployment, require_no_sleeper, wait_for_people
from d3po_core.config import CampaignConfig
from d3po_core.errors import D3POError
from d3po_core.models.model_files import with_model_defaults
from d3po_core.processes.engine import processes_end_here
from d3po_core.store.campaign import begin_round, campaign_lock
from d3po_core.store.goals import end_run


@flow(name="d3po", persist_result=False, validate_parameters=True)
def d3po(rounds: int = 1, config: FormConfig = None) -> State:
    """Run more rounds of a campaign after its last finished one; start the campaign if it is new.

    If a run is killed, a retry or the same command again ends at the first run's target round.

    Args:
        rounds: how many rounds to add.
        config: the campaign's configuration. A run of a deployment needs only what differs from the deployment's
            values. For fields that the form does not show, choose 'Use JSON input' in the menu at the right.
    """
    logger, begun = get_run_logger(), False
    try:
        campaign = with_model_defaults(over_deployment(config or CampaignConfig()))
        name_run(campaign)
        for warning in check_campaign(campaign):
            logger.warning(warning)
        busy = campaign_lock(campaign.folder, who=f"flow run {flow_run.id}")
        running = counts_as_running()
        with busy, processes_end_here(), running, mirrored(campaign), current_at_the_end(campaign):
            numbers = plan_rounds(campaign, rounds, run_id=str(flow_run.id))
            require_deployment(campaign, numbers)
            require_no_sleeper(campaign, numbers)
            name_run(campaign, numbers)
            for missed in skip_missed_nights():
                logger.info("the scheduled run %s was missed too; this run stands for it", missed)
            for number in numbers:
                require_trust(campaign, number - 1)
                begin_round(campaign, number)
                begun = True
                _finish_round(campaign, number)
            end_run(campaign.folder, run_id=str(flow_run.id))
    except D3POError as error:
        # The user can fix it: one line, no traceback.
        return Failed(message=str(error)) if begun else refused(str(error))
    return Completed(message=campaign_line(campaign, numbers))


def _finish_round(config: CampaignConfig, number: int) -> None:
    """Do the stages of a round that are not finished yet."""
    if number > 0:  # round 0 is the base model: only evaluated
        sample_images(config, number)
        judge_images(config, number)
        wait_for_people(config, number)  # with labeller 'human' or 'mixed', the run sleeps here
        derive_pairs(config, number)
        train_policy(config, number)
    evaluate_checkpoint(config, number)
    guard_round(config, number)
    finished = publish_round(config, number)
    get_run_logger().info("%s", round_line(config, finished))
