"""Commands that export a folder to share: preferences as a dataset, or trained weights with a model card."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from d3po.flows.commands.parts import CampaignOption, loading, outside_campaigns

OutputOption = Annotated[Path, typer.Option(help="Folder to create; overwrites nothing")]


def export_preferences(
    output: OutputOption,
    campaign: CampaignOption = "shapes",
    shard_megabytes: Annotated[int, typer.Option(min=1, help="Maximum MB of images per Parquet file")] = 400,
) -> None:
    """Export a campaign's pairs and images as a dataset for Diffusion-DPO trainers."""
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
    """Export a round's LoRA, or its fully trained network, with a model card, ready to upload."""
    from d3po_core.store.campaign import campaign_named, round_config

    folder = campaign_named(campaign).folder
    outside_campaigns(output)
    with loading():
        from d3po_core.export.lora import export_lora as export
        from d3po_core.models.weights import loading_line
        from d3po_core.queries.lookup import rejection
    number = export(folder, output, round)
    if rejected := rejection(folder, number):
        print(f"warning: {rejected}", file=sys.stderr)
    model = round_config(folder, number).model
    print(f"round {number} in {output}: {loading_line(output, repr(str(output)), model)}")
