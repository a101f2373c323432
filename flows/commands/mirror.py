"""The commands pull, push and mirror status: a campaign in object storage."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from d3po.flows.commands import completing
from d3po.flows.commands.parts import print_table
from d3po_core.config import CampaignConfig
from d3po_core.errors import D3POError

app = typer.Typer(no_args_is_help=True, help="Look at a campaign's mirror in object storage.")
UrlArgument = Annotated[str, typer.Argument(help="Address of the mirrored campaign: store.mirror/CAMPAIGN")]
CampaignArgument = Annotated[str, typer.Argument(help="Name of the campaign", autocompletion=completing.campaigns)]


def pull(url: UrlArgument) -> None:
    """Bring a campaign from its mirror into the data folder; nothing that is there is overwritten."""
    config = config_at(url)
    print(f"campaign {config.campaign}: {pulled_line(config)}")


def push(
    campaign: CampaignArgument,
    to: Annotated[str | None, typer.Option(help="Mirror to use, if the campaign has none or another one")] = None,
) -> None:
    """Put what the mirror lacks of a campaign into it."""
    from d3po_core.mirror.opening import push as put

    done, objects = put(_config_of(campaign, to))
    news = f"{done.stages} stages" if done.stages else "no new stage"
    print(f"campaign {campaign}: put {news}{', and judgements or settings that changed' if done.version else ''}")
    print(f"{objects.shown}: {_counted(objects)}")


@app.command()
def status(
    where: Annotated[str, typer.Argument(help="Name of a campaign, or address of a mirrored one")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object")] = False,
) -> None:
    """Show what a mirror holds, what is missing there, how large it is, and who holds the lease."""
    from d3po_core.mirror.opening import open_mirror
    from d3po_core.mirror.standing import standing

    config = config_at(where) if "://" in where else _config_of(where, None)
    objects, lease = open_mirror(config)
    found = standing(config.folder, objects, lease)
    if as_json:
        print(json.dumps(found))
    else:
        print_table(("mirror", objects.shown), [(name.replace("_", " "), value) for name, value in found.items()])


def config_at(url: str) -> CampaignConfig:
    """The configuration of a campaign in the data folder whose mirror is at an address.

    Raises:
        D3POError: the address names no campaign.
    """
    from d3po_core.config_values import load_config
    from d3po_core.mirror.reading import split_url

    base, name = split_url(url)
    return load_config({"campaign": name, "store": {"mirror": base}}, url)


def pulled_line(config: CampaignConfig) -> str:
    """Bring a campaign from its mirror; a line on what came.

    Raises:
        D3POError: the mirror has no such campaign, or is away.
    """
    from d3po_core.mirror.objects import open_objects
    from d3po_core.mirror.pulling import pull_campaign
    from d3po_core.mirror.versions import newest_version
    from d3po_core.store.campaign import campaign_lock

    objects = open_objects(config.store.mirror or "", config.campaign, config.store.timeout_seconds)
    if newest_version(objects) is None:  # before the folder is made
        raise D3POError(f"{objects.shown} holds no campaign; look at the address, or type: d3po mirror status CAMPAIGN")
    with campaign_lock(config.folder, who="pull"):
        pulled = pull_campaign(config.folder, config.store, objects)
    assert pulled is not None, "it was there a moment ago"
    return f"{pulled.in_words}; {_counted(objects)}"


def _config_of(campaign: str, mirror: str | None) -> CampaignConfig:
    from d3po_core.mirror.state import read_state
    from d3po_core.store.campaign import campaign_named, rules_of

    folder: Path = campaign_named(campaign).folder
    config = rules_of(folder)
    store = read_state(folder).config if read_state(folder).store else config.store
    store = store.model_copy(update={"mirror": mirror}) if mirror else store
    if store.mirror is None:
        raise D3POError(f"campaign {campaign!r} has no mirror; name one: d3po push {campaign} --to s3://BUCKET/PREFIX")
    return config.model_copy(update={"store": store})


def _counted(objects: Any) -> str:
    requests = ", ".join(f"{count} {kind}" for kind, count in sorted(objects.requests.items()))
    return (
        f"{objects.bytes_sent / 1e6:.1f} MB sent, {objects.bytes_received / 1e6:.1f} MB received; requests: {requests}"
    )
