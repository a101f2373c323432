"""``d3po invite`` and ``d3po revoke``: who may judge a campaign, as on the owner's page."""

from enum import StrEnum
from typing import Annotated

import typer

from d3po.flows.commands.parts import CampaignOption
from d3po.flows.page_links import rater_link
from d3po_core.errors import D3POError
from d3po_core.paths import data_folder

Assign = StrEnum("Assign", ["any", "split"])


def invite(
    rater: Annotated[list[str] | None, typer.Argument(help="Names of raters")] = None,
    campaign: CampaignOption = "shapes",
    quota: Annotated[
        int | None, typer.Option(min=0, help="Most groups per round for each of them; 0 removes the limit")
    ] = None,
    assign: Annotated[
        Assign | None,
        typer.Option(help="any: everybody may judge every group; split: deal the groups out to the invited raters"),
    ] = None,
) -> None:
    """Invite raters to a campaign and print their links; from then on only invited raters may judge it."""
    from d3po_core.page.access import Raters
    from d3po_core.people.invitations import read_invitations, set_assignment
    from d3po_core.people.rater_names import name_problem
    from d3po_core.store.campaign import campaign_named

    folder, raters = campaign_named(campaign).folder, Raters(data_folder())
    if not rater and assign is None:
        raise D3POError(
            "invite: name a rater, such as: d3po invite ann, or say how groups reach raters: --assign split"
        )
    for name in rater or []:  # all of them before the first is invited
        if problem := name_problem(name):
            raise D3POError(f"rater {name!r}: {problem}; nobody was invited")
    for name in rater or []:
        print(f"{name}: {rater_link(raters.invite(folder, name, quota))}")
    if assign is not None:
        set_assignment(folder, "split" if assign is Assign.split else "any")
    now = read_invitations(folder)
    how = "groups are dealt out evenly" if now.assignment == "split" else "any rater may judge any group"
    print(f"campaign {folder.name}: {len(now.standing)} invited; {how}")


def revoke(
    rater: Annotated[list[str], typer.Argument(help="Names of raters")], campaign: CampaignOption = "shapes"
) -> None:
    """End raters' links at once, in every campaign; their answers stay and are marked."""
    from d3po_core.page.access import Raters
    from d3po_core.store.campaign import campaign_named

    folder, raters = campaign_named(campaign).folder, Raters(data_folder())
    for name in rater:
        ended = "the link no longer works" if raters.revoke(folder, name) else "had no link already"
        print(f"{name}: {ended}; their answers in campaign {folder.name} stay")
