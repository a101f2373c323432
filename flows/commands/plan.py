"""The command plan: what a run will do, before anything is loaded."""

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Column, Table

from d3po.flows.commands.parts import (
    ConfigOption,
    DeploymentArgument,
    NameOption,
    RoundsOption,
    SettingOption,
    console,
)


def plan(
    deployment: DeploymentArgument = "round",
    rounds: RoundsOption = 1,
    campaign: NameOption = None,
    file: ConfigOption = None,
    setting: SettingOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole plan as JSON")] = False,
) -> None:
    """Print what `d3po run` would do, how long it takes and what it needs; it loads and writes nothing."""
    from d3po.flows.planning import settings
    from d3po.flows.presets import deployment_config
    from d3po_core.planning.plan import make_plan
    from d3po_core.planning.told import sections

    config = deployment_config(deployment, campaign, setting or [], file)
    made, changed = make_plan(config, rounds), settings(deployment, config, file)
    if as_json:
        fields = [{"field": name, "value": value, "from": source} for name, value, source in changed]
        print(json.dumps(asdict(made) | {"seconds": made.seconds, "settings": fields}, indent=2))
    else:
        print(f"campaign {made.campaign}")
        lines = Table.grid(padding=(0, 2))
        for name, text in sections(made):
            lines.add_row(name, text)
        console().print(lines)
        print(f"\n{'Settings that differ from the defaults:' if changed else 'All settings are the defaults.'}")
        table = Table("setting", Column("value", overflow="fold"), "from")
        for name, value, source in changed:
            table.add_row(name, value if isinstance(value, str) else json.dumps(value), source)
        console().print(table if changed else "")
    for problem in made.problems:
        typer.echo(f"d3po: {problem}", err=True)
    if made.problems:
        raise typer.Exit(1)
