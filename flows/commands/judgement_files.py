"""The commands ``d3po import`` and ``d3po export-sheet``."""

from pathlib import Path
from typing import Annotated

import typer

from d3po.flows.commands.parts import CampaignOption
from d3po_core.config import CampaignConfig
from d3po_core.errors import D3POError
from d3po_core.ways import Mode

RoundOption = Annotated[
    int | None, typer.Option("--round", min=1, help="The round; by default the file's, else the last one sampled")
]


def import_judgements(
    file: Annotated[Path, typer.Argument(help="CSV or JSON file; formats in docs/judgements.md")],
    campaign: CampaignOption = "shapes",
    round_number: RoundOption = None,
    rater: Annotated[str | None, typer.Option(help="Rater of rows that name none")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only check and report")] = False,
    accept_valid: Annotated[
        bool, typer.Option("--accept-valid", help="Import the good rows even if others are bad")
    ] = False,
    gold: Annotated[bool, typer.Option("--gold", help="The judgements are known answers to gold questions")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Then resume the run that waits for them")] = False,
    late: Annotated[
        bool, typer.Option("--late", help="Keep them even if the round's preferences are already derived")
    ] = False,
    order: Annotated[
        str | None, typer.Option(help="For a list without ids: a sheet's manifest.json, or 'sampled'")
    ] = None,
    scale: Annotated[str | None, typer.Option(help="Words of the rating scale, worst first: poor,fair,good")] = None,
    columns: Annotated[
        str | None, typer.Option(help="Names of the columns, ours=theirs: winner=better,loser=worse,rater=who")
    ] = None,
    control: Annotated[str | None, typer.Option(help="Label Studio control to read")] = None,
    left: Annotated[str | None, typer.Option(help="Column of the left image in Label Studio's tasks")] = None,
    report: Annotated[Path | None, typer.Option(help="Write all problems to this file")] = None,
) -> None:
    """Import people's judgements from a file; one wrong row stops the whole import."""
    from d3po_core.judgement_files.importing import import_file, renaming
    from d3po_core.judgement_files.report import MAX_LINES, write_problems
    from d3po_core.store.campaign import campaign_named

    config = campaign_named(campaign)
    words = tuple(scale.split(",")) if scale else ()
    found = import_file(
        config.folder, file, round_number, rater, dry_run, accept_valid, gold, late, order, words,
        renaming(columns), control, left,
    )  # fmt: skip
    print("\n".join(found.summary()))
    if report is None and len(found.problems) > MAX_LINES and not dry_run:
        report = file.with_name(f"{file.name}.problems.txt")
    if report is not None:
        print(f"all problems: {write_problems(found, report)}")
    if not found.accepted:
        hint = "" if not found.num_good else ", or import the others with --accept-valid"
        raise D3POError(f"{file.name}: {found.num_bad:,} of {found.num_rows:,} rows are wrong; correct them{hint}")
    if resume and not dry_run:
        _resume_waiting(config, found.round_number)


def _resume_waiting(config: CampaignConfig, round_number: int) -> None:
    from d3po.flows.servers import find_prefect

    if not find_prefect():
        raise D3POError("--resume: no Prefect server is running here, so no run waits; the judgements are kept")
    from d3po.tasks.waiting import resume_waiting  # loads prefect, which a plain import does not need

    print(resume_waiting(config, round_number))


def export_sheet(
    output: Annotated[Path, typer.Argument(help="Folder to write; must not exist yet")],
    campaign: CampaignOption = "shapes",
    round_number: RoundOption = None,
    mode: Annotated[
        Mode | None,
        typer.Option(help="What the rater does; the campaign's mode by default"),
    ] = None,
    rater: Annotated[str | None, typer.Option(help="Rater's name, filled in for them")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the images' order; by default the rater's own")] = None,
) -> None:
    """Write a folder for judging offline: images, a CSV to fill in, and sheet.html to view them."""
    from d3po_core.judgement_files.sheets import CSV_FILE, PAGE_FILE
    from d3po_core.judgement_files.sheets import export_sheet as export
    from d3po_core.store.campaign import campaign_named

    config = campaign_named(campaign)
    sheet = export(config, output, round_number, mode, rater, seed)
    print(f"{output}: {sheet.num_images} images of round {sheet.round_number}, {sheet.num_rows} rows to fill in")
    print(f"open {output / PAGE_FILE}, fill in {output / CSV_FILE}, then:")
    print(f"  d3po import {output / CSV_FILE} --campaign {config.campaign}")
