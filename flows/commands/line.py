"""The command ``d3po``: run rounds, look at the results, query the tables, start and stop the servers."""

import atexit
import os
import sys
import threading
from collections.abc import Callable
from importlib.metadata import version
from typing import Annotated, NoReturn

import typer

from d3po.flows.commands import campaigns, mirror
from d3po.flows.commands.again import prune, regenerate, replay
from d3po.flows.commands.ask import check, query, show
from d3po.flows.commands.browse import browse
from d3po.flows.commands.doctor import doctor
from d3po.flows.commands.export import export_lora, export_preferences
from d3po.flows.commands.import_dataset import import_dataset
from d3po.flows.commands.init import init
from d3po.flows.commands.invite import invite, revoke
from d3po.flows.commands.judgement_files import export_sheet, import_judgements
from d3po.flows.commands.label import label
from d3po.flows.commands.mirror import pull, push
from d3po.flows.commands.plan import plan
from d3po.flows.commands.raters import raters
from d3po.flows.commands.report import compare, report
from d3po.flows.commands.rounds import discard_round, rounds
from d3po.flows.commands.run import run
from d3po.flows.commands.servers import down, status, up
from d3po.flows.commands.submit import submit
from d3po.flows.loopback import without_proxy
from d3po_core.errors import D3POError

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
PANELS: dict[str, tuple[Callable[..., None], ...]] = {
    "Before a run": (plan, doctor, import_dataset),
    "People judge": (label, invite, revoke, import_judgements, export_sheet, raters),
    "Look": (query, show, browse, compare, report, check),
    "Another machine": (pull, push),
    "Make again, drop, take away": (regenerate, replay, prune, export_preferences, export_lora),
}
for panel, commands in PANELS.items():
    for command in commands:
        name = "import" if command is import_judgements else None
        app.command(name, rich_help_panel=panel)(command)
for command in (run, submit, rounds, discard_round, up, down, status, init):
    app.command()(command)
app.add_typer(mirror.app, name="mirror", rich_help_panel="Another machine")
app.add_typer(campaigns.app, name="campaigns", rich_help_panel="Look")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"d3po {version('d3po')}")
        raise typer.Exit


@app.callback()
def options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit")
    ] = False,
) -> None:
    """Run rounds, look at the results, query the tables, start and stop the servers."""


def main() -> None:
    """Run the command line; an error that the user can fix prints one line and exits with status 2."""
    status: int | str | None = 0
    os.environ.update(without_proxy(os.environ))  # our own servers are never behind a proxy
    try:
        app()
    except SystemExit as end:
        status = end.code
    except D3POError as error:
        print(f"d3po: {error}", file=sys.stderr)
        status = 2
    except Exception as error:
        print(f"d3po: {_prefect_refuses(error)}", file=sys.stderr)
        status = 2
    _leave(status if isinstance(status, int) else 1)


def _prefect_refuses(error: Exception) -> str:
    """A line about an HTTP error of the Prefect server; raises any other error again."""
    import httpx

    if not isinstance(error, httpx.HTTPStatusError):
        raise error
    url, code = error.request.url, error.response.status_code
    wants = "; it wants its login in PREFECT_API_AUTH_STRING (or PREFECT_API_KEY)" if code in (401, 403) else ""
    said = f" ({' '.join(error.response.text.split())[:300]})" if code in (409, 422) else ""
    return f"the Prefect server answers {url.copy_with(userinfo=b'', query=None)} with {code}{wants}{said}"


def _leave(status: int) -> NoReturn:
    """End the process after its exit handlers, without tearing the interpreter down.

    Prefect's event loops are daemon threads and survive a teardown; duckdb 2.0 would then print a hundred lines about
    leaked types.
    """
    # In the interpreter's order: wait for threads, then run the handlers.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
