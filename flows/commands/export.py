"""Commands that make a folder for others: preferences as a dataset, a LoRA or a trained network with its model card."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from flows.commands.parts import CampaignOption, loading, outside_campaigns

OutputOption = Annotated[Path, typer.Option(help="Folder to make; nothing is overwritten")]


def export_preferences(
    output: OutputOption,
    campaign: CampaignOption = "shapes",
    shard_megabytes: Annotated[
        int, typer.Option(min=1, help="Images in one Parquet file have at most so many MB")
    ] = 400,
) -> None:
    """Write a campaign's pairs with their images as a dataset for trainers of Diffusion-DPO."""
    from d3po_core.export.preferences import export_preferences as export
    from d3po_core.store.campaign import campaign_named

    outside_campaigns(output)
    count = export(campaign_named(campaign).folder, output, shard_megabytes * 1_000_000)
    print(f"{count} pairs in {output}: datasets.load_dataset({str(output)!r})")


def export_lora(
    output: OutputOption,
    campaign: CampaignOption = "shapes",
    round: Annotated[str, typer.Option(help="champion, latest or the number of a finished round")] = "champion",
) -> None:
    """Write a round's LoRA (or its network, if all of it was trained) with a model card, ready to upload."""
    from d3po_core.store.campaign import campaign_named

    folder = campaign_named(campaign).folder
    outside_campaigns(output)
    with loading():
        from d3po_core.export.lora import export_lora as export
        from d3po_core.models.weights import loading_line
        from d3po_core.queries.lookup import rejection
    number = export(folder, output, round)
    if rejected := rejection(folder, number):
        print(f"warning: {rejected}", file=sys.stderr)
    print(f"round {number} in {output}: {loading_line(output, repr(str(output)))}")
