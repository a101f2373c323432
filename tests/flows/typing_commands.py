"""Type commands as a person does, in this process."""

from pathlib import Path

import typer
from typer.testing import CliRunner


def typed(app: typer.Typer, *words: str | Path) -> str:
    """What a command prints; an error of its own, or an exit that is not 0, is raised."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output
