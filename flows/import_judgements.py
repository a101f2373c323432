"""The flow ``import-judgements``: ``d3po import`` as a flow run on a server."""

from pathlib import Path

from prefect import flow, get_run_logger
from prefect.states import Completed, Failed, State

from d3po_core.errors import D3POError
from d3po_core.judgement_files.importing import renaming
from d3po_core.store.campaign import campaign_named
from tasks.importing import import_judgement_file


@flow(name="import-judgements", flow_run_name="{campaign} {file}", persist_result=False, validate_parameters=True)
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
    """Check a file of people's judgements and add it to a round of a campaign.

    Args:
        file: path of the file, on the machine that the run runs on; formats in docs/judgements.md.
        campaign: name of the campaign.
        round: the round; when empty the one that the file's ids name, else the last that was sampled.
        rater: who judged the rows that do not say it.
        dry_run: check and report only.
        accept_valid: write the good rows of a file that has bad ones.
        gold: the judgements are known answers to gold questions.
        resume: let the run that waits for these judgements go on.
        late: keep judgements of a round whose preferences were derived before.
        order: of a list without ids: path of a sheet's manifest.json, or sampled.
        scale: words of an ordered scale of ratings, the worst first: poor,fair,good.
        columns: which column is which, ours=theirs: winner=better,loser=worse.
        control: which control of Label Studio counts.
        left: which column of Label Studio's tasks stood on the left.
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
            return Failed(message=report.summary()[-1] + f": {report.num_bad} of {report.num_rows} rows are wrong")
        if resume and not dry_run:
            from tasks.waiting import resume_waiting

            resume_waiting(config, report.round_number)
    except D3POError as error:
        return Failed(message=str(error))
    return Completed(message="; ".join(report.summary()[-2:]))
