"""Commands that recompute results and drop files: regenerate, replay, prune."""

import contextlib
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from d3po.flows.commands.parts import CampaignOption, console, loading, outside_campaigns
from d3po_core.errors import D3POError

ThreadsOption = Annotated[int | None, typer.Option(min=1, help="CPU threads; by default as many as the round used")]
# On CPUs, other batches and threads moved pixels of the embedded model by 1; other devices may round more coarsely.
TOLERANCE = 8


def regenerate(
    sample_id: Annotated[str, typer.Argument(help="Id such as r3-g4-m1, or r3-e17 for a held-out image")],
    campaign: CampaignOption = "shapes",
    output: Annotated[Path | None, typer.Option(help="PNG file to write")] = None,
    tolerance: Annotated[
        int, typer.Option(min=0, max=255, help="Largest pixel difference, of 255, that counts as rounding")
    ] = TOLERANCE,
    threads: ThreadsOption = None,
) -> None:
    """Generate an image again, with its whole batch, and compare it with the stored file."""
    from d3po_core.store.campaign import campaign_named

    folder = campaign_named(campaign).folder
    outside_campaigns(output)
    with loading():
        from d3po_core.reproducing.regenerate import batch_of
        from d3po_core.reproducing.regenerate import regenerate as draw_again
        from d3po_core.store.images import save_png

        policy = _policy(folder, batch_of(folder, sample_id).round, threads)
    result = draw_again(folder, sample_id, policy)
    if output:
        save_png(result.image, output)
    place = f"{output or '(not written, no --output)'}, drawn with the {result.batch_size} images of its batch"
    difference = result.largest_difference
    if difference is None:
        verdict = f"nothing to compare with: {result.stored} is gone"
    elif result.same_bytes:
        verdict = "identical: the same bytes as the stored file"
    elif difference == 0:
        verdict = "identical in every pixel; the PNG files differ, another Pillow or zlib packed them"
    else:
        verdict = f"largest pixel difference {difference} of 255, tolerance {tolerance}"
    print(f"{sample_id}: {verdict}\n{place}")
    if difference:
        print(_conditions(result.made_on, result.computed_on))
    if difference is not None and difference > tolerance:
        raise D3POError(f"{sample_id}: differs from the stored image by up to {difference} of 255, more than rounding "
                        "should; was the base model or the image file changed?")  # fmt: skip


def replay(
    campaign: Annotated[str, typer.Argument(help="Name of the campaign")],
    round: Annotated[str, typer.Option(help="champion, latest or the number of a finished round")] = "latest",
    threads: ThreadsOption = None,
) -> None:
    """Train a round again from its files and compare the weights; writes nothing."""
    from d3po_core.queries.lookup import trained_round
    from d3po_core.store.campaign import campaign_named

    folder = campaign_named(campaign).folder
    number = trained_round(folder, round)
    with loading():
        from d3po_core.reproducing.replay import check_replayable, replay_round

        check_replayable(folder, number)
        policy = _policy(folder, number, threads)
    result = replay_round(folder, number, policy)
    if result.sampled_again:
        print(f"sampled anew, their files are gone: {', '.join(result.sampled_again)}; {result.images_identical} of "
              f"{result.images_compared} stored images came out the same")  # fmt: skip
    print(f"stored    {result.stored_sha256}\nreplayed  {result.sha256}  ({result.num_updates} updates)")
    if result.failure:
        print(f"stopped: {result.failure}")
    if result.identical:
        print(f"round {number}: the same weights, byte for byte")
        return
    if result.largest_difference is not None:
        print(f"largest difference of a weight {result.largest_difference:.1e}; the round moved weights by up to "
              f"{result.largest_move:.1e}")  # fmt: skip
    print(_conditions(result.made_on, result.computed_on))
    print(f"round {number}: other weights")
    raise typer.Exit(1)


def prune(
    campaign: CampaignOption = "shapes",
    keep_rounds: Annotated[int, typer.Option(help="Leave this many of the latest finished rounds unchanged")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be dropped")] = False,
) -> None:
    """Drop trajectories of finished rounds; images and training can still be reproduced."""
    from d3po_core.store.campaign import campaign_lock, campaign_named
    from d3po_core.store.prune import apply_prune, plan_prune

    folder = campaign_named(campaign).folder
    with contextlib.nullcontext() if dry_run else campaign_lock(folder, who="prune"):
        plan = plan_prune(folder, keep_rounds)
        if not dry_run:
            apply_prune(folder, plan)
    verb = "would drop" if dry_run else "dropped"
    table = Table("kind", "files", "MB", f"{verb}: files", f"{verb}: MB")
    for kind in plan.usage:
        cells = (kind.files, kind.bytes / 1e6, kind.dropped_files, kind.dropped_bytes / 1e6)
        table.add_row(kind.kind, *(f"{cell:.1f}" if isinstance(cell, float) else str(cell) for cell in cells))
    console().print(table)
    print(f"{verb} {plan.bytes / 1e6:.1f} MB of {len(plan.rounds)} finished rounds")


def _policy(folder: Path, round_number: int, threads: int | None) -> Any:
    """Load a round's model, with the given or recorded number of threads."""
    import torch

    from d3po_core.models.asked import asked_by
    from d3po_core.models.loaded import load_policy
    from d3po_core.reproducing.regenerate import made_on
    from d3po_core.store.campaign import round_config
    from d3po_core.store.integrity import require_whole
    from d3po_core.store.stages import start_of

    require_whole(folder, {round_number, start_of(folder, round_number)}, ["checkpoints"])
    wanted = threads or (made_on(folder, round_number) or {}).get("threads")
    if wanted:
        torch.set_num_threads(wanted)
    config = round_config(folder, round_number)
    return load_policy(config.model, config.seed, folder, asked_by(config))


def _conditions(made_on: dict[str, Any] | None, now: dict[str, Any]) -> str:
    """A line on what affects rounding, when the round ran and now."""

    def told(values: dict[str, Any]) -> str:
        processes = f"{values['processes']} processes, " if values["processes"] > 1 else ""
        return f"{processes}{values['device']}, {values['threads']} CPU threads, torch {values['torch']}"

    if made_on is None:
        return (f"computed on {told(now)}; the round did not record what it was computed on. Another number of threads "
                "adds in another order, which moves the last digits: try --threads with the number it had")  # fmt: skip
    if made_on == now:
        return f"computed on {told(now)}, as the round was: another processor or another base model, or files changed"
    return f"computed on {told(now)}, the round on {told(made_on)}: that alone moves the last digits"
