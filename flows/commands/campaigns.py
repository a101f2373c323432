"""The commands campaigns and campaigns delete: what campaigns there are, and dropping one."""

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from d3po.flows.commands import completing
from d3po.flows.commands.parts import print_table, shown
from d3po_core.errors import D3POError

app = typer.Typer(invoke_without_command=True)


@app.callback()
def campaigns(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object per line")] = False,
) -> None:
    """List the campaigns: rounds, last held-out score, champion, size, and what waits for people."""
    if context.invoked_subcommand:
        return
    from d3po_core.report.campaigns import campaign_states

    states = campaign_states()
    if as_json:
        print("\n".join(json.dumps(_record(state)) for state in states))
    elif not states:
        print("no campaigns yet; type: d3po run round")
    else:
        columns = ("campaign", "rounds", "held-out", "champion", "MB", "waits for people", "last change (UTC)")
        print_table(columns, [_row(state) for state in states])
        for state in states:
            if state.problem:
                print(shown(f"{state.name}: {state.problem}"))


@app.command()
def delete(
    campaign: Annotated[
        str,
        typer.Argument(help="Name of the campaign, or its folder", autocompletion=completing.campaigns),
    ],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask")] = False,
) -> None:
    """Delete a campaign's folder after asking; its runs in MLflow and Prefect stay."""
    from d3po_core.report.campaigns import campaign_state
    from d3po_core.store.campaign import campaign_lock
    from d3po_core.store.leftovers import delete_campaign, require_no_link

    state = campaign_state(campaign)
    # The state's folder of a typed path is where a link leads.
    require_no_link(Path(campaign).expanduser() if os.sep in campaign else state.folder)
    rounds = f"{max(state.rounds, 0)} rounds, {state.megabytes:.1f} MB"
    if state.waits_for:
        print(f"people have yet to judge {state.waits_for}; also cancel the waiting run, on Prefect's page")
    if not yes and not typer.confirm(f"Delete campaign {state.name} ({rounds}) in {state.folder}?"):
        raise D3POError("nothing was deleted")
    with campaign_lock(state.folder, who="campaigns delete"):
        delete_campaign(state.folder)
    print(f"campaign {state.name}: deleted ({rounds}); its runs in MLflow and Prefect stay")


def _row(state: Any) -> list[Any]:
    if state.problem:
        return [state.name, "?", "cannot be read", None, f"{state.megabytes:.1f}", None, _minute(state.changed)]
    champion = None if state.champion is None else state.champion or "base"
    rounds = "none" if state.rounds < 0 else state.rounds
    megabytes, changed = f"{state.megabytes:.1f}", _minute(state.changed)
    score = state.score and f"{state.score.mean:.3f}"
    return [state.name, rounds, score, champion, megabytes, state.waits_for, changed]


def _record(state: Any) -> dict[str, Any]:
    score = state.score
    return {
        "campaign": state.name, "folder": str(state.folder), "rounds": state.rounds, "scorer": state.scorer,
        "score": score and score.mean, "low": score and score.ends[0], "high": score and score.ends[1],
        "champion": state.champion, "bytes": round(state.megabytes * 1e6), "waits_for": state.waits_for,
        "changed": state.changed.isoformat(), "problem": state.problem,
    }  # fmt: skip


def _minute(moment: Any) -> str:
    return f"{moment:%Y-%m-%d %H:%M}"
