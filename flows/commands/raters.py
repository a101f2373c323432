"""``d3po raters``: who judged, how well, and how much raters agree."""

import json
from dataclasses import asdict, fields
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from d3po.flows.commands.parts import CampaignOption, console, writing
from d3po.flows.page_links import waiting_lines

if TYPE_CHECKING:
    from d3po_core.people.raters import RaterReport, RaterSummary

RaterFormat = StrEnum("RaterFormat", ["table", "csv", "json"])
# Chance, per rater, of reporting a bias that is not there.
BIAS_P = 0.05


def raters(
    campaign: CampaignOption = "shapes",
    round_number: Annotated[int | None, typer.Option("--round", min=1, help="Only this round")] = None,
    format: Annotated[RaterFormat, typer.Option(help="How to write the result")] = RaterFormat.table,
    output: Annotated[Path | None, typer.Option(help="File to write")] = None,
) -> None:
    """Print the raters: judgements, speed, right gold answers, bias and agreement; and what waits for whom."""
    from d3po_core.errors import D3POError
    from d3po_core.people.invitations import read_invitations
    from d3po_core.people.raters import connect_with_journal, rater_report
    from d3po_core.people.reports import ImageReports
    from d3po_core.store.campaign import campaign_named, rules_of

    folder = campaign_named(campaign).folder
    # Rules may change between rounds: one round uses its own, all rounds together use the last one's.
    people = rules_of(folder, round_number).judge.people
    with connect_with_journal(folder) as connection:
        report = rater_report(connection, people.accuracy_floor, round_number)
    waiting = waiting_lines(folder)
    if not report.raters:
        where = f"campaign {campaign!r}" if round_number is None else f"round {round_number} of campaign {campaign!r}"
        why = waiting[0] if waiting else "judge.labeller says who judges"
        raise D3POError(f"raters: no person has judged anything in {where} yet; {why}")
    with writing(output) as stream:
        if format is RaterFormat.json:
            json.dump(asdict(report), stream, indent=1)
            stream.write("\n")
        elif format is RaterFormat.csv:
            _write_csv(report, stream)
        else:
            gone = {name for name, one in read_invitations(folder).raters.items() if one.revoked}
            _print_table(report, people.accuracy_floor, gone, stream)
            stream.writelines(f"{line}\n" for line in ImageReports(folder).lines(round_number))
            stream.writelines(f"{line}\n" for line in waiting)


def _write_csv(report: "RaterReport", stream: Any) -> None:
    import csv

    from d3po_core.people.raters import RaterSummary
    from d3po_core.spreadsheets import neutralise

    writer = csv.DictWriter(stream, [field.name for field in fields(RaterSummary)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(rater) | {"rater": neutralise(rater.rater)} for rater in report.raters)


def _print_table(report: "RaterReport", accuracy_floor: float, revoked: set[str], stream: Any) -> None:
    from rich.table import Table

    table = Table()
    for column in ("rater", "judged", "skipped", "taken back", "both bad", "groups", "seconds", "gold right [95 %]",
                   "reliability", "agreement", "first place [95 %]", ""):  # fmt: skip
        table.add_column(column, justify="left" if column in ("rater", "") else "right", no_wrap=bool(column))
    for rater in report.raters:
        table.add_row(*_cells(rater, rater.rater in revoked))
    console(stream).print(table)
    lines = [
        f"Krippendorff's alpha {_number(report.alpha)}, equal votes {_number(report.agreement)} "
        f"(over {report.pairs_of_several} of {report.pairs} pairs, those with several raters)"
    ]
    if any(rater.left_out for rater in report.raters):
        lines.append(f"left out: below judge.people.accuracy_floor ({accuracy_floor:g}) with their whole interval")
    stream.write("\n".join(lines) + "\n")


def _cells(rater: "RaterSummary", revoked: bool) -> list[str]:
    gold, place = "-", "-"
    if rater.gold_answered:
        gold = f"{rater.gold_right:.3g}/{rater.gold_answered} [{rater.gold_low:.2f}, {rater.gold_high:.2f}]"
    if rater.placed:
        place = f"{rater.first_share:.2f} [{rater.first_low:.2f}, {rater.first_high:.2f}]"
    notes = ["revoked"] * revoked + ["left out"] * rater.left_out
    if rater.first_p is not None and rater.first_share is not None and rater.first_p < BIAS_P:
        notes.append(f"prefers the {'first' if rater.first_share > 0.5 else 'second'} place")
    return [
        rater.rater, str(rater.judgements), str(rater.skips), str(rater.taken_back), str(rater.both_bad),
        str(rater.groups), _number(rater.seconds, 1), gold, _number(rater.reliability), _number(rater.agreement), place,
        ", ".join(notes),
    ]  # fmt: skip


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
