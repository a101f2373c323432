"""The command run: rounds of a campaign in this terminal, with a Prefect server of its own if none runs."""

import contextlib
import os
from collections.abc import Iterator
from functools import partial
from typing import Annotated

import typer

from d3po.flows.commands.parts import ConfigOption, DeploymentArgument, NameOption, RoundsOption, SettingOption
from d3po.flows.commands.rounds import show_campaign
from d3po.flows.commands.submit import require_no_wait
from d3po.flows.interrupting import ctrl_c_ends_it, end_here, note_flow_run
from d3po.flows.presets import deployment_config, verified
from d3po.tasks.live_line import live_line
from d3po_core.errors import D3POError
from d3po_core.paths import data_folder


def run(
    deployment: DeploymentArgument = "round",
    rounds: RoundsOption = 1,
    campaign: NameOption = None,
    file: ConfigOption = None,
    setting: SettingOption = None,
    origin: Annotated[
        str | None, typer.Option("--from", help="Go on with a mirrored campaign: s3://BUCKET/PREFIX/CAMPAIGN")
    ] = None,
) -> None:
    """Run rounds of a campaign in this terminal; needs no server."""
    from d3po.flows.planning import announce

    settings = setting or []
    if origin:
        from d3po.flows.commands.mirror import pulled_line
        from d3po_core.mirror.reading import split_url

        mirror, campaign = split_url(origin)
        settings = [*settings, f"store.mirror={mirror}"]
    config = deployment_config(deployment, campaign, settings, file)
    if origin:
        print(f"campaign {config.campaign}: {pulled_line(config)}")
    require_no_wait(config, rounds)
    announce(config, rounds)
    if said := verified(deployment):
        print(f"verified  {said}", flush=True)
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
