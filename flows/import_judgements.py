"""The flow ``import-judgements``: ``d3po import`` as a flow run on a server."""

from pathlib import Path

from prefect import flow, get_run_logger
from prefect.states import Completed, State

from d3po.flows.refusing import refused
from d3po.tasks.importing import import_judgement_file
from d3po_core.errors import D3POError
from d3po_core.judgement_files.importing import renaming
from d3po_core.store.campaign import campaign_named


@flow(
    name="import-judgements", flow_run_name="{campaign}: import {file}", persist_result=False, validate_parameters=True
)
def import_judgements(
    file: str,
    campaign: str = "shapes",
    round: int | None = None,
    rater: str | None = None,
    dry_run: bool = False,
    accept_valid: bool = False,
    gold: bool = False,
    resume: bool = False,
    late: bool = False,
    order: str | None = None,
    scale: str | None = None,
    columns: str | None = None,
    control: str | None = None,
    left: str | None = None,
) -> State:
    """Check a file of people's judgements and add them to a round of a campaign.

    Args:
        file: path of the file on the machine of the run; formats in docs/judgements.md.
        campaign: name of the campaign.
        round: the round; by default the one in the file's ids, else the last one sampled.
        rater: rater of rows that name none.
        dry_run: only check and report.
        accept_valid: import the good rows even if others are bad.
        gold: the judgements are known answers to gold questions.
        resume: then resume the run that waits for these judgements.
        late: keep the judgements even if the round's preferences are already derived.
        order: for a list without ids: path of a sheet's manifest.json, or sampled.
        scale: words of the rating scale, worst first: poor,fair,good.
        columns: names of the columns, ours=theirs: winner=better,loser=worse.
        control: Label Studio control to read.
        left: column of the left image in Label Studio's tasks.
    """
    logger = get_run_logger()
    try:
        config = campaign_named(campaign)
        words = tuple(scale.split(",")) if scale else ()
        report = import_judgement_file(
            config.folder, Path(file), round, rater, dry_run, accept_valid, gold, late, order, words,
            renaming(columns), control, left,
        )  # fmt: skip
        for line in report.summary():
            logger.info("%s", line)
        if not report.accepted:
            return refused(report.summary()[-1] + f": {report.num_bad} of {report.num_rows} rows are wrong")
        if resume and not dry_run:
            from d3po.tasks.waiting import resume_waiting

            resume_waiting(config, report.round_number)
    except D3POError as error:
        return refused(str(error))
    return Completed(message="; ".join(report.summary()[-2:]))
