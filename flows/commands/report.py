"""Commands that show results: ``d3po compare`` and ``d3po report``; registered in line.py."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from d3po.flows.commands.parts import ReadCampaignOption, console
from d3po_core.errors import D3POError
from d3po_core.paths import path_from_here

if TYPE_CHECKING:
    from d3po_core.evaluation.comparison import HeldOut


def compare(
    checkpoints: Annotated[
        list[str] | None,
        typer.Argument(help="Round, base, latest or champion; or CAMPAIGN:ROUND. The first is the reference"),
    ] = None,
    campaign: ReadCampaignOption = "shapes",
    output: Annotated[Path | None, typer.Option(help="Picture to write; by default in the campaign's folder")] = None,
) -> None:
    """Compare checkpoints on the same held-out prompts and seeds: scores, people's preferences, a picture."""
    from d3po_core.evaluation.comparison import read_held_out
    from d3po_core.report.pictures import comparison_picture
    from d3po_core.store.at_hand import bring_paths

    names = checkpoints or ["base", "champion", "latest"]
    labels, chosen = _checkpoints(names, campaign)
    if len(chosen) < 2:
        raise D3POError(f"compare: {', '.join(names)} is one checkpoint ({labels[0]}); expected two or more, "
                        "such as: d3po compare base latest")  # fmt: skip
    held_out = read_held_out(chosen)
    lacking = sum(map(bring_paths, held_out.image_paths))
    print_comparison(held_out, labels)
    if "champion" in [name.rpartition(":")[2] for name in names]:
        print("a champion is the best of many looks at these images, and a little lucky: d3po report judges it on "
              "prompts that did not choose it")  # fmt: skip
    gone = [path for paths in held_out.image_paths for path in paths if not path.is_file()]
    if lacking:
        print(
            f"{lacking} image(s) are not in the mirror (store.mirror_images was off): no diversity or picture of them"
        )
    elif gone:
        print(f"{len(gone)} image(s) are gone and left out of diversity and picture; first: {path_from_here(gone[0])}")
    print_preferred(chosen, labels)
    if lacking == sum(map(len, held_out.image_paths)):
        return  # nothing to draw
    if output is None:
        words = "-".join(
            f"{folder.name}.{number}" if folder != chosen[0][0] else str(number) for folder, number in chosen
        )
        output = chosen[0][0] / "report" / f"compare-{words}.png"
    print(f"\npicture  {path_from_here(comparison_picture(held_out, labels, output))}")


def _checkpoints(names: list[str], campaign: str) -> tuple[list[str], list[tuple[Path, int]]]:
    """Labels of the named checkpoints, and their campaigns' folders with their rounds, each once."""
    from d3po_core.evaluation.comparison import round_named
    from d3po_core.mirror.reading import campaign_at

    several = len({name.rpartition(":")[0] or campaign for name in names}) > 1
    labels: list[str] = []
    chosen: list[tuple[Path, int]] = []
    for name in names:
        owner, _, word = name.rpartition(":")
        folder = campaign_at(owner or campaign).folder
        found = (folder, round_named(folder, word))
        if found not in chosen:
            chosen.append(found)
            label = f"round {found[1]}" if found[1] else "base"
            label += f", {word}" if found[1] and not word.isdigit() else ""
            labels.append(f"{folder.name}: {label}" if several else label)
    return labels, chosen


def report(
    campaign: ReadCampaignOption = "shapes",
    output: Annotated[Path | None, typer.Option(help="File to write; by default the campaign's report.html")] = None,
) -> None:
    """Write the report, one HTML file: is it better, is it sane, which one to ship, why did it change."""
    from d3po.flows.servers import mlflow_page
    from d3po_core.mirror.reading import campaign_at
    from d3po_core.report.write import write_report
    from d3po_core.store.at_hand import source_of
    from d3po_core.store.campaign import campaign_id

    config = campaign_at(campaign)
    path = write_report(config, output, mlflow_page(campaign_id(config.folder)))
    print(f"{path_from_here(path)}  ({path.stat().st_size / 1e6:.1f} MB)")
    if (source := source_of(config.folder)) and (lacking := source.lacking):
        print(f"{lacking} images are not in the mirror (store.mirror_images was off); the report is without them")


def print_comparison(held_out: "HeldOut", labels: list[str]) -> None:
    """Print one table per scorer: every checkpoint against the first."""
    import numpy as np
    from rich.table import Table

    from d3po_core.evaluation.comparison import compare_scores
    from d3po_core.intervals import score_intervals
    from d3po_core.report.answers import interval, number
    from d3po_core.store.images import diversity_by_prompt

    spreads = [list(diversity_by_prompt(held_out.prompts, paths).values()) for paths in held_out.image_paths]
    for scorer, scores in held_out.scores.items():
        size = f"{len(held_out.prompts)} images of {len(set(held_out.prompts))} held-out prompts"
        table = Table(title=f"{scorer} on {size}, against {labels[0]}; [95 % intervals]", title_justify="left")
        for column in ("checkpoint", "mean", "difference", "wins, ties half", "verdict", "diversity"):
            words = column in ("checkpoint", "verdict")
            table.add_column(column, justify="left" if words else "right", no_wrap=column != "checkpoint")
        for row, mean in enumerate(score_intervals(scores, held_out.prompts)):
            cells = [labels[row], f"{number(mean.mean)} {interval(mean)}", "", "", ""]
            if row:
                c = compare_scores(scores[row], scores[0], held_out.prompts)
                cells[2] = f"{number(c.difference.mean, '+')} {interval(c.difference, '+')}"
                cells[3:] = f"{number(c.win_rate.mean)} {interval(c.win_rate)}", c.verdict
            table.add_row(*cells, number(float(np.mean(spreads[row]))) if spreads[row] else "images removed")
        console().print(table)


def print_preferred(chosen: list[tuple[Path, int]], labels: list[str]) -> None:
    """Print how often people preferred each checkpoint to the first, blind, or how to ask them."""
    from rich.table import Table

    from d3po_core.people.blind import collect_comparisons
    from d3po_core.people.human_win_rate import human_win_rate, human_win_rates
    from d3po_core.report.answers import interval, number
    from d3po_core.store.at_hand import source_of

    (folder, reference), *_ = chosen
    others = [(label, n) for label, (place, n) in zip(labels[1:], chosen[1:], strict=True) if place == folder]
    collect_comparisons(folder)
    rates = human_win_rates(folder)
    found = [(label, rate) for label, n in others if (rate := human_win_rate(rates, n, reference))]
    if found:
        table = Table(title=f"people, blind, against {labels[0]}; [95 % interval over prompts]", title_justify="left")
        for column in ("checkpoint", "preferred, ties half", "verdict", "pairs", "judgements", "ties", "people"):
            table.add_column(column, justify="left" if column in ("checkpoint", "verdict") else "right")
        for label, rate in found:
            counts = (rate.num_pairs, rate.num_judgements, rate.num_ties, rate.num_raters)
            share = f"{number(rate.win_rate.mean)} {interval(rate.win_rate)}"
            table.add_row(label, share, rate.verdict, *map(str, counts))
        console().print(table)
    elif others and source_of(folder) is None:
        asked, against = sorted((others[-1][1], reference), reverse=True)
        print(f"people have not compared these; ask them: d3po label --compare {asked} --against {against or 'base'} "
              f"--campaign {folder.name}")  # fmt: skip
