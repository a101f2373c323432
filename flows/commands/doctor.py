"""The command that checks the machine: doctor."""

import typer

from d3po_core.machine.health import State

COLOURS: dict[State, str] = {"ok": "green", "warn": "yellow", "fail": "red"}


def doctor() -> None:
    """Check Python, torch, GPU memory, disk, model cache, libraries, ports and servers; exit 1 if a check fails."""
    from d3po.flows.doctor import examine

    failed = False
    for check in examine():
        failed |= check.state == "fail"
        remedy = f"; {check.remedy}" if check.remedy else ""
        typer.echo(f"{typer.style(f'{check.state:4}', fg=COLOURS[check.state])}  {check.name}: {check.found}{remedy}")
    if failed:
        raise typer.Exit(1)
