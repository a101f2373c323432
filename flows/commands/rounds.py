"""The commands rounds and discard-round: a campaign's rounds, and dropping an unfinished one."""

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from d3po.flows.commands.parts import CampaignOption, ReadCampaignOption, console
from d3po.flows.presets import command_that_goes_on
from d3po_core.config import CampaignConfig
from d3po_core.errors import D3POError
from d3po_core.paths import data_folder, path_from_here
from d3po_core.records import RoundRecord

LAST_ROUNDS = 50  # in the table, besides the base


def rounds(campaign: ReadCampaignOption = "shapes") -> None:
    """Print a table of the campaign's rounds, of a long campaign the last 50, and where its files are."""
    from d3po_core.mirror.reading import campaign_at

    show_campaign(campaign_at(campaign))


def discard_round(
    campaign: CampaignOption = "shapes",
    with_judgements: Annotated[bool, typer.Option(help="Even if people have judged the round already")] = False,
) -> None:
    """Delete the unfinished round, so that it can start again; finished rounds stay."""
    from d3po_core.mirror.opening import forget_in_mirror
    from d3po_core.people.questions import count_judgements
    from d3po_core.store.campaign import campaign_lock, campaign_named
    from d3po_core.store.leftovers import discard_round as discard
    from d3po_core.store.stages import last_finished_round

    folder = campaign_named(campaign).folder
    with campaign_lock(folder, who="discard-round"):
        said = count_judgements(folder, last_finished_round(folder) + 1)
        if said and not with_judgements:
            raise D3POError(
                f"people have made {said} judgements of the unfinished round of campaign {campaign!r}, which would be "
                "lost; finish the round, or drop it all the same with --with-judgements"
            )
        number = discard(folder)
        forget_in_mirror(folder, last_finished_round(folder) + 1)
    print(f"campaign {campaign}: " + ("no unfinished round" if number is None else f"round {number} dropped"))


def show_campaign(config: CampaignConfig) -> None:
    """Print the finished rounds, where the files are, and what to type next."""
    from d3po.flows.page_links import waiting_lines
    from d3po_core.store.at_hand import source_of
    from d3po_core.store.stages import finished_numbers, finished_rounds

    numbers, waiting = finished_numbers(config.folder), waiting_lines(config.folder)
    shown = numbers[:1] + numbers[1:][-LAST_ROUNDS:]
    records = finished_rounds(config.folder, shown)
    if not records:
        what = waiting[0] if waiting else _first_round_to_come(config)
        raise D3POError(f"campaign {config.campaign!r} has no finished round yet; {what}")
    console().print(_table(config.campaign, records))
    first, last = records[0], records[-1]
    if source := source_of(config.folder):
        print("\n".join([*_left_out(source.shown, numbers, shown), *waiting, *_in_mirror(source.shown, first, last)]))
        return
    folder = path_from_here(config.folder)
    name = str(config.folder) if config.runs_dir else config.campaign  # how commands find the campaign
    from d3po.flows.server_processes import known_ports, leader

    mlflow = f"http://127.0.0.1:{known_ports().get('mlflow', 5000)}"
    up = "" if leader("prefect") else "d3po up: "
    lines = (
        *_left_out(name, numbers, shown),
        *waiting,
        f"held-out score {first.score.mean:.3f} -> {last.score.mean:.3f} after round {last.round}",
        f"images      {folder}/images/round=*/  (grid.png: the same prompts and seeds every round)",
        f"tables      {folder}/<table>/round=*/*.parquet",
        f"checkpoint  {folder}/{last.checkpoint or '(base model, none yet)'}",
        f"MLflow      {path_from_here(data_folder())}/mlflow  ({up}{mlflow})",
        "",
        "next:",
        f"  {_next_command(config.folder, last.round, bool(waiting))}",
        f"  d3po query --campaign {shlex.quote(name)} "
        '"SELECT prompt, avg(score) FROM evaluations GROUP BY prompt ORDER BY 2"',
    )
    print("\n".join(lines))
    if up:
        print("  d3po up     # Prefect, a worker and MLflow; then the first command with submit in place of run")


def _table(campaign: str, records: list[RoundRecord]) -> Table:
    """The table of the rounds: scores with intervals, pairs, and seconds per stage."""
    table = Table(title=f"campaign {campaign}: held-out {records[0].eval_scorer}", title_justify="left")
    stages = ("sample", "judge", "train", "evaluate")
    heads = [f"{stage.replace('evaluate', 'eval')}\n[s]" for stage in stages]
    for column in ("round", "held-out [95 %]", "pairs", "ties", *heads):
        table.add_column(column, justify="right", no_wrap=True)
    for record in records:
        score, seconds = record.score, record.stage_seconds
        table.add_row(
            str(record.round) if record.round else "base",
            str(score),
            str(record.num_pairs), str(record.num_ties), *(f"{seconds[stage]:.1f}" for stage in stages),
        )  # fmt: skip
    return table


def _in_mirror(url: str, first: RoundRecord, last: RoundRecord) -> list[str]:
    """What to say below the table of a mirrored campaign."""
    return [
        f"held-out score {first.score.mean:.3f} -> {last.score.mean:.3f} after round {last.round}",
        f"mirror      {url}  (read only)",
        "",
        "next:",
        f"  d3po report --campaign {shlex.quote(url)}",
        f"  d3po pull {shlex.quote(url)}     # to go on with it here",
    ]


def _left_out(campaign: str, numbers: list[int], shown: list[int]) -> list[str]:
    """How to see the rounds that a long campaign's table leaves out; nothing if it has all."""
    if not (missing := sorted(set(numbers) - set(shown))):
        return []
    return [
        f"rounds {missing[0]} to {missing[-1]} are not shown; for all: d3po query --campaign {shlex.quote(campaign)} "
        '"SELECT round, eval_score_mean, num_pairs, num_ties FROM rounds ORDER BY round"'
    ]


def _next_command(folder: Path, last: int, waits: bool) -> str:
    """What brings the campaign on: people, the rest of a run that was begun, or more rounds."""
    from d3po_core.store.campaign import round_config
    from d3po_core.store.goals import unfinished_goal

    if waits:
        return "d3po label --rater NAME     # prints a link to the page where people judge"
    config = round_config(folder, last)
    if goal := unfinished_goal(folder):
        return f"{command_that_goes_on(config, goal['rounds'])}     # finishes the run that was begun"
    return command_that_goes_on(config)


def _first_round_to_come(config: CampaignConfig) -> str:
    """What to do about a campaign without a finished round: wait for the run that has begun, or start one."""
    from d3po_core.store.goals import unfinished_goal

    goal = unfinished_goal(config.folder)
    if goal is None:
        return f"type: {command_that_goes_on(config)}"
    return f"a run has begun it; wait, or if that run was cut off, type: {command_that_goes_on(config, goal['rounds'])}"
