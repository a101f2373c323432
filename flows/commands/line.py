"""The command ``d3po``: run rounds, look at the results, query the tables, start and stop the servers."""

import atexit
import contextlib
import os
import shlex
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from typing import Annotated, NoReturn

import typer
from rich.table import Table

from d3po.flows.commands import campaigns
from d3po.flows.commands.again import prune, regenerate, replay
from d3po.flows.commands.ask import check, query, show
from d3po.flows.commands.browse import browse
from d3po.flows.commands.doctor import doctor
from d3po.flows.commands.export import export_lora, export_preferences
from d3po.flows.commands.init import init
from d3po.flows.commands.invite import invite, revoke
from d3po.flows.commands.judgement_files import export_sheet, import_judgements
from d3po.flows.commands.label import label
from d3po.flows.commands.parts import (
    CampaignOption,
    ConfigOption,
    DeploymentArgument,
    NameOption,
    RoundsOption,
    SettingOption,
    console,
)
from d3po.flows.commands.plan import plan
from d3po.flows.commands.raters import raters
from d3po.flows.commands.report import compare, report
from d3po.flows.commands.submit import require_no_wait, submit
from d3po.flows.interrupting import ctrl_c_ends_it, end_here, note_flow_run
from d3po.flows.loopback import without_proxy
from d3po.flows.presets import command_that_goes_on, deployment_config
from d3po.tasks.live_line import live_line
from d3po_core.config import CampaignConfig
from d3po_core.errors import D3POError
from d3po_core.paths import data_folder, path_from_here

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
PANELS: dict[str, tuple[Callable[..., None], ...]] = {
    "Before a run": (plan, doctor),
    "People judge": (label, invite, revoke, import_judgements, export_sheet, raters),
    "Look": (query, show, browse, compare, report, check),
    "Make again, drop, take away": (regenerate, replay, prune, export_preferences, export_lora),
}
for panel, commands in PANELS.items():
    for command in commands:
        name = "import" if command is import_judgements else None
        app.command(name, rich_help_panel=panel)(command)
app.command()(init)
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


@app.command()
def run(
    deployment: DeploymentArgument = "round",
    rounds: RoundsOption = 1,
    campaign: NameOption = None,
    file: ConfigOption = None,
    setting: SettingOption = None,
) -> None:
    """Run rounds of a campaign in this terminal; needs no server."""
    from d3po.flows.planning import announce

    config = deployment_config(deployment, campaign, setting or [], file)
    require_no_wait(config, rounds)
    announce(config, rounds)
    with ctrl_c_ends_it(), live_line("loading torch, diffusers and prefect"):
        _use_local_prefect()  # before anything imports prefect, which reads its settings once
        with _starting_server():
            from d3po.flows.round import d3po
            from d3po.tasks.publishing import check_campaign
            from d3po_core.models.model_files import with_model_defaults

            config = with_model_defaults(config)
            check_campaign(config)
        from d3po.flows.prefect_trouble import prefect_may_die

        with prefect_may_die(config.folder):
            state = d3po.with_options(on_running=[note_flow_run], flow_run_name=config.campaign)(
                rounds, config, return_state=True
            )
            if not state.is_completed():
                raise D3POError(state.message or f"the run ended as {state.name}")
    show_campaign(config)


app.command()(submit)


@app.command()
def rounds(campaign: CampaignOption = "shapes") -> None:
    """Print a table of the campaign's rounds, and where its files are."""
    from d3po_core.store.campaign import campaign_named

    show_campaign(campaign_named(campaign))


@app.command()
def discard_round(
    campaign: CampaignOption = "shapes",
    with_judgements: Annotated[bool, typer.Option(help="Even if people have judged the round already")] = False,
) -> None:
    """Delete the unfinished round, so that it can start again; finished rounds stay."""
    from d3po_core.people.questions import count_judgements
    from d3po_core.store.campaign import campaign_lock, campaign_named
    from d3po_core.store.leftovers import discard_round as discard
    from d3po_core.store.stages import last_finished_round

    folder = campaign_named(campaign).folder
    with campaign_lock(folder, who="discard-round"):
        said = count_judgements(folder, last_finished_round(folder) + 1)
        if said and not with_judgements:
            raise D3POError(
                f"people have made {said} judgements of the unfinished round of campaign {campaign!r}, which would be "
                "lost; finish the round, or drop it all the same with --with-judgements"
            )
        number = discard(folder)
    print(f"campaign {campaign}: " + ("no unfinished round" if number is None else f"round {number} dropped"))


@app.command()
def up(
    prefect_port: Annotated[
        int | None, typer.Option(help="Port of the Prefect server; by default the one used last, at first 4200")
    ] = None,
    mlflow_port: Annotated[
        int | None, typer.Option(help="Port of the MLflow server; by default the one used last, at first 5000")
    ] = None,
    label_port: Annotated[
        int | None, typer.Option(help="Port of the labelling page; by default the one used last, at first 8700")
    ] = None,
    nightly: Annotated[
        list[str] | None, typer.Option(help="Also run this deployment every night, e.g. round; may be repeated")
    ] = None,
) -> None:
    """Start Prefect's server and worker, MLflow and the labelling page on 127.0.0.1; register the deployments."""
    from d3po.flows import servers

    print("\n".join(servers.up(prefect_port, mlflow_port, label_port, nightly or ())))


@app.command()
def down() -> None:
    """Stop everything that ``d3po up`` started."""
    from d3po.flows import servers

    print("\n".join([*servers.down(), *servers.lost_servers()]))


@app.command()
def status() -> None:
    """Show which servers are running, and which rounds wait for people."""
    from d3po.flows import servers
    from d3po.flows.page_links import waiting_lines

    print("\n".join([*servers.status(), *servers.lost_servers(), *waiting_lines()]))


def show_campaign(config: CampaignConfig) -> None:
    """Print the finished rounds, where the files are, and what to type next."""
    from d3po.flows.page_links import waiting_lines
    from d3po_core.store.campaign import round_config
    from d3po_core.store.stages import finished_rounds

    records, waiting = finished_rounds(config.folder), waiting_lines(config.folder)
    if not records:
        what = waiting[0] if waiting else _first_round_to_come(config)
        raise D3POError(f"campaign {config.campaign!r} has no finished round yet; {what}")
    table = Table(title=f"campaign {config.campaign}: held-out {records[0].eval_scorer}", title_justify="left")
    stages = ("sample", "judge", "train", "evaluate")
    heads = [f"{stage.replace('evaluate', 'eval')}\n[s]" for stage in stages]
    for column in ("round", "held-out [95 %]", "pairs", "ties", *heads):
        table.add_column(column, justify="right", no_wrap=True)
    for record in records:
        score, seconds = record.score, record.stage_seconds
        table.add_row(
            str(record.round) if record.round else "base",
            str(score),
            str(record.num_pairs), str(record.num_ties), *(f"{seconds[stage]:.1f}" for stage in stages),
        )  # fmt: skip
    console().print(table)
    first, last = records[0], records[-1]
    folder = path_from_here(config.folder)
    name = str(config.folder) if config.runs_dir else config.campaign  # how commands find the campaign
    from d3po.flows.server_processes import known_ports

    mlflow = f"http://127.0.0.1:{known_ports().get('mlflow', 5000)}"
    lines = (
        *waiting,
        f"held-out score {first.score.mean:.3f} -> {last.score.mean:.3f} in {last.round} rounds",
        f"images      {folder}/images/round=*/  (grid.png: the same prompts and seeds every round)",
        f"tables      {folder}/<table>/round=*/*.parquet",
        f"checkpoint  {folder}/{last.checkpoint or '(base model, none yet)'}",
        f"MLflow      {path_from_here(data_folder())}/mlflow  (d3po up opens it on {mlflow})",
        "",
        "next:",
        f"  {command_that_goes_on(round_config(config.folder, last.round))}",
        f"  d3po query --campaign {shlex.quote(name)} "
        '"SELECT prompt, avg(score) FROM evaluations GROUP BY prompt ORDER BY 2"',
        "  d3po up     # Prefect, a worker and MLflow; then the first command with submit in place of run",
    )
    print("\n".join(lines))


def _first_round_to_come(config: CampaignConfig) -> str:
    """What to do about a campaign without a finished round: wait for the run that has begun, or start one."""
    from d3po_core.store.goals import unfinished_goal

    goal = unfinished_goal(config.folder)
    if goal is None:
        return f"type: {command_that_goes_on(config)}"
    return f"a run has begun it; wait, or if that run was cut off, type: {command_that_goes_on(config, goal['rounds'])}"


@contextlib.contextmanager
def _starting_server() -> Iterator[None]:
    """Start Prefect's temporary server if needed; when the context ends, the server answers."""
    if "PREFECT_API_URL" in os.environ:
        from d3po.flows.prefect_trouble import require_prefect

        require_prefect()
        yield
        return
    from d3po.tasks.temporary_server import TemporaryServer

    server = TemporaryServer(lost=partial(end_here, status=1))
    os.environ["PREFECT_API_URL"] = server.url
    yield
    server.wait()


def _use_local_prefect() -> None:
    """Use the server of ``d3po up`` if it runs, else a temporary server on the same database."""
    from d3po.flows.server_programs import QUIET, temporary_environment
    from d3po.flows.servers import end_orphans, find_prefect
    from d3po_core.store.files import disk_errors

    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("PREFECT_LOGGING_LOGGERS_PREFECT_TASK_RUNS_LEVEL", "WARNING")
    os.environ.setdefault("PREFECT_LOGGING_LOGGERS_PREFECT_LEVEL", "WARNING")
    os.environ.setdefault("PREFECT_LOGGING_LOGGERS_PREFECT_FLOW_RUNS_LEVEL", "INFO")
    if "PREFECT_API_URL" in os.environ:
        find_prefect()
        return
    home = data_folder() / "prefect"
    with disk_errors(home):
        home.mkdir(parents=True, exist_ok=True)
    os.environ["PREFECT_HOME"] = str(home)
    end_orphans()
    if not find_prefect():
        os.environ.update(temporary_environment())
