"""The command that makes a project."""

import shlex
from pathlib import Path
from typing import Annotated

import typer


def init(folder: Annotated[str, typer.Argument(help="Name of a new or empty folder")]) -> None:
    """Write a project: deployments, prompts, the embedded model, an example scorer and configuration."""
    from d3po.flows.project import make_project
    from d3po_core.paths import absolute

    place = absolute(folder, Path(), "FOLDER")
    make_project(place)
    print(f"project made in {place}; its README.md says what is where\n\nnext:")
    print(f"  cd {shlex.quote(str(place))}\n  d3po run round")
