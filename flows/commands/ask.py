"""Commands that read a campaign: query, show, check."""

import contextlib
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from d3po.flows.commands.parts import CampaignOption, ReadCampaignOption, outside_campaigns, print_table, shown, writing
from d3po_core.errors import D3POError

Format = StrEnum("Format", ["table", "csv", "json", "parquet"])


def query(
    sql: Annotated[str, typer.Argument(help='For example "SELECT * FROM pairs WHERE people_against > 0"')],
    campaign: ReadCampaignOption = "shapes",
    format: Annotated[Format, typer.Option(help="How to write the result")] = Format.table,
    output: Annotated[Path | None, typer.Option(help="File to write; required for parquet")] = None,
) -> None:
    """Query all rounds with SQL: tables, and views like pairs, checkpoints, human_comparisons (docs/questions.md)."""
    from d3po_core.mirror.reading import campaign_at
    from d3po_core.people.blind import collect_comparisons
    from d3po_core.people.on_page import ask_with_page

    folder = campaign_at(campaign).folder
    outside_campaigns(output)
    # A read-only folder can be queried too, only without the latest answers of people.
    with contextlib.suppress(D3POError):
        collect_comparisons(folder)
    with ask_with_page(folder, sql) as answer:
        _write(answer, format.value, output)


def show(
    sample_id: Annotated[str, typer.Argument(help="Id such as r3-g4-m1, or r3-e17 for a held-out image")],
    campaign: ReadCampaignOption = "shapes",
) -> None:
    """Show where an image came from: prompt, seed, checkpoint and run; and its judgements and pairs."""
    from d3po_core.image_ids import is_imported
    from d3po_core.mirror.reading import campaign_at
    from d3po_core.queries.lookup import image_story
    from d3po_core.store.at_hand import source_of

    folder = campaign_at(campaign).folder
    story = image_story(folder, sample_id)
    image, run = story.image, story.run or {}
    place = "held-out" if story.held_out else f"group {image['group_id']}, member {image['member']}"
    settings = [f"{name} = {value!r}" for name, _, value in story.settings if name not in ("campaign", "runs_dir")]
    lines = [
        f"{sample_id}    round {story.round}, {place}",
        f"prompt      {image['prompt']}",
        f"seed        {image['seed']}",
        *([f"size        {image['height']} x {image['width']} pixels (height x width)"] if image["height"] else []),
        f"image       {folder / image['image_path']}{_absent(folder, image['image_path'])}",
    ]
    if story.held_out or not is_imported(image["trajectory_path"]):
        lines.append(f"checkpoint  {image['checkpoint'] or '(base model)'}")
    if not story.held_out:
        path = image["trajectory_path"]
        pruned = not source_of(folder) and not (folder / path).exists()
        there = " (pruned; a replay samples it anew)" if pruned else ""
        what = "data set    latent in" if is_imported(path) else "trajectory "
        lines.append(f"{what} {path}, row {image['trajectory_row']}{there}")
    lines += [
        f"run         MLflow {run.get('mlflow_run_id') or 'unknown'}, git {(run.get('git_commit') or 'unknown')[:10]}"
        if run else "run         round not finished",
        f"config      {folder}/stages/round={story.round}/config.json",
        f"            differs from the defaults in {', '.join(settings) or 'nothing'}",
    ]  # fmt: skip
    print("\n".join(map(shown, lines)))
    _rows("judgements", story.judgements, ("rater", "rater_kind", "kind", "sample_id", "other_id", "value",
                                           "both_bad", "judged_at", "source"))  # fmt: skip
    _rows("pairs", story.pairs, ("winner_id", "loser_id", "weight", "agreement", "people_for", "people_against",
                                 "proxies_for", "proxies_against"))  # fmt: skip
    if story.held_out:
        _rows("compared blind", story.compared, ("rater", "sample_id", "against_id", "vote", "judged_at"))
    _rows("the same prompt and seed in every round", story.scores, ("round", "scorer", "score"))


def check(campaign: CampaignOption = "shapes") -> None:
    """Check the digests of all files from finished stages; list damaged and missing ones."""
    from d3po_core.store.campaign import campaign_named
    from d3po_core.store.integrity import count_files, damages
    from d3po_core.store.stages import finished_numbers, last_finished_round, stage_path

    folder = campaign_named(campaign).folder
    found = damages(folder)
    for damage in found:
        print(shown(damage))
    noted, unnoted = count_files(folder), [n for n in finished_numbers(folder) if not count_files(folder, [n])]
    older = f"; {len(unnoted)} rounds of an earlier version have no digests" if unnoted else ""
    if (last := last_finished_round(folder)) >= 0 and not stage_path(folder, last, "publish").with_suffix(
        ".files"
    ).exists():
        older += f"; the row of round {last} has no digest (publish.files) until the next run"
    print(f"campaign {folder.name}: {noted} files, {len(found)} damaged or gone{older}")
    if found:
        raise typer.Exit(1)


def _absent(folder: Path, image: str) -> str:
    """Bring an image from the mirror; what to say if it is not there, nothing for a campaign on disk."""
    from d3po_core.store.at_hand import bring_paths

    return " (not in the mirror: store.mirror_images was off)" if bring_paths([folder / image]) else ""


def _rows(title: str, rows: list[dict[str, Any]], columns: tuple[str, ...]) -> None:
    print(f"{title}: {len(rows) or 'none'}")
    if not rows:
        return
    print_table(columns, [[row[column] for column in columns] for row in rows])


def _write(answer: Any, format: str, output: Path | None) -> None:
    from d3po_core.queries.query import print_answer, write_answer
    from d3po_core.store.files import atomic_path

    if format == "parquet" and output is None:
        raise D3POError("query: parquet is not for terminals; add --output FILE.parquet")
    if format == "table":
        with writing(output) as stream:
            print_table(answer.columns, answer.fetchall(), stream)
    elif output:
        with atomic_path(output, "or name another --output") as temporary:
            write_answer(answer, format, temporary)
    else:
        print_answer(answer, format)
