"""``d3po label``: serve the labelling page, print raters' links, start blind comparisons."""

import getpass
import re
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from d3po.flows.page_links import owner_line, page_port
from d3po_core.errors import D3POError
from d3po_core.paths import data_folder
from d3po_core.ways import Mode

if TYPE_CHECKING:
    from d3po_core.page.completion import OnComplete
    from d3po_core.page.desk import Priority

# Enough to notice a slip and press U; the run sleeps for hours anyway.
GRACE_SECONDS = 8.0
BLIND = "Compare checkpoints, blind"


def label(
    rater: Annotated[
        list[str] | None, typer.Option(help="Name of a rater; may be repeated, also while the page runs")
    ] = None,
    mode: Annotated[Mode | None, typer.Option(help="How people judge; judge.people.mode by default")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Port to listen on; by default that of d3po up, else 8700")
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(envvar="D3PO_LABEL_HOSTS", help="Name that other machines use for this one; may be repeated"),
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(
            help="Also let people compare this round (a number, champion or latest) blind with a reference; "
            "d3po compare shows how often they prefer it", rich_help_panel=BLIND,
        ),
    ] = None,
    against: Annotated[str, typer.Option(help="The reference: base or a round", rich_help_panel=BLIND)] = "base",
    pairs: Annotated[int, typer.Option(min=1, help="Pairs in total", rich_help_panel=BLIND)] = 48,
    raters_per_pair: Annotated[
        int, typer.Option(min=1, max=100, help="People asked per pair", rich_help_panel=BLIND)
    ] = 1,
    campaign: Annotated[str, typer.Option(help="Campaign of the two rounds", rich_help_panel=BLIND)] = "shapes",
) -> None:  # fmt: skip
    """Serve the page where people judge rounds and compare checkpoints; Ctrl-C stops it and loses nothing."""
    from d3po_core.people.information import question_priority

    if compare is not None:
        begin_blind(campaign, compare, against, pairs, raters_per_pair)
    elif against != "base":
        raise D3POError(f"--against {against} needs the round that is compared with it: add --compare ROUND")
    serve_page(_wake, question_priority, rater, mode, host, port or page_port(), allow_host, _compared)


def begin_blind(campaign: str, compare: str, against: str, pairs: int, raters: int) -> None:
    """Start a blind comparison, or add pairs to one, and print its progress.

    Raises:
        D3POError: there is no such campaign or round, or nothing to compare.
    """
    from d3po_core.evaluation.comparison import round_named
    from d3po_core.people.blind import begin_comparison, comparison_progress, title_of
    from d3po_core.store.campaign import campaign_named

    folder = campaign_named(campaign).folder
    found, missing = begin_comparison(folder, round_named(folder, compare), round_named(folder, against), pairs, raters)
    progress = comparison_progress(folder, found)
    prompts = len({pair.prompt for pair in found.pairs})
    people = f", {found.raters} people each" if found.raters > 1 else ""
    reference = f"round {found.against}" if found.against else "the base"
    print(
        f"{title_of(found.id)}: round {found.round} against {reference} "
        f"of campaign {campaign}, {len(found.pairs)} pairs of {prompts} held-out prompts{people}; "
        f"{progress.groups_done} done"
    )
    if missing:
        print(f"{missing} pairs cannot be asked: their images are no longer on disk")


def _wake(campaign: str, round_number: int) -> None:
    """Wake the run that waits for the round, on the server of ``d3po up`` or of the shell's settings."""
    from d3po.flows.servers import find_prefect
    from d3po_core.config import CampaignConfig
    from d3po_core.store.stages import stage_path

    if find_prefect():
        from d3po.tasks.waiting import wake

        wake(campaign, round_number)
    elif stage_path(CampaignConfig(campaign=campaign).folder, round_number, "waiting").exists():
        raise D3POError("no Prefect server runs here, so the round cannot be woken yet; type: d3po up")


def _compared(campaign: str, round_number: int) -> None:
    """Send results of blind comparisons to MLflow; if it is down, the campaign's next run sends them."""
    from d3po.tasks.tracking.delivery import deliver_comparisons
    from d3po_core.store.campaign import campaign_named

    deliver_comparisons(campaign_named(campaign))


def serve_page(
    on_complete: "OnComplete", priority: "Priority | None", rater: list[str] | None, mode: str | None, host: str,
    port: int, allow_host: list[str] | None, on_compared: "OnComplete" = lambda *_: None,
    grace_seconds: float = GRACE_SECONDS,
) -> None:  # fmt: skip
    """Print the raters' links and serve the page until the process is stopped.

    Whoever has a link can judge. So links are printed only to a terminal, or if the page runs already; a log only
    says how to get one.

    Args:
        on_complete: see ``d3po_core.page.app.create_app``.
        priority: the same.
        rater: names that get a link; by default those that have one, else the name of the account.
        mode: how people judge; None means the configuration's mode.
        host: address to listen on.
        port: port to listen on.
        allow_host: further names that reach the page.
        on_compared: see ``d3po_core.page.app.create_app``.
        grace_seconds: the same.

    Raises:
        D3POError: another program uses the port, or the data folder cannot be written.
    """
    from d3po_core.page.access import Raters

    data = data_folder()
    raters = Raters(data)
    # A server in the background must not make a rater whom nobody named, whose answers a round would then wait for.
    names = rater or raters.names() or ([_account()] if sys.stdout.isatty() else [])
    reached = next(iter(allow_host or ()), "127.0.0.1" if host in ("0.0.0.0", "::") else host)
    runs = _page_runs(host, port)
    root, show = f"http://{f'[{reached}]' if ':' in reached else reached}:{port}", runs or sys.stdout.isatty()
    for name in names:
        token = raters.token(name)
        shown = (
            f"{root}/enter?key={token}" if show else f"to get the link, type: d3po label --rater {name} --port {port}"
        )
        print(f"{name}: {shown}", flush=True)
    print(owner_line(root, show), flush=True)
    if runs:
        print("the page runs already; these links work there")
        return
    from d3po_core.page.app import create_app
    from d3po_core.page.gate import LOCAL_HOSTS
    from d3po_core.page.serving import serve

    hosts = {*LOCAL_HOSTS, *(allow_host or ()), *({host} - {"0.0.0.0", "::"})}
    app = create_app(
        data, on_complete, priority, mode=mode, hosts=hosts, on_compared=on_compared, grace_seconds=grace_seconds
    )
    print("Ctrl-C ends the page; what was judged is kept", flush=True)
    _keep_mirrored(data / "runs")
    serve(app, host, port)


def _keep_mirrored(runs: Path) -> None:
    """Put judgements of mirrored campaigns into their mirrors while the page runs."""
    from d3po.tasks.mirroring_people import watch_people

    threading.Thread(target=watch_people, args=(runs, threading.Event()), name="mirror", daemon=True).start()


def _account() -> str:
    return re.sub(r"[^A-Za-z0-9_.@-]", "_", getpass.getuser()).lstrip("_.@-") or "rater"


def _page_runs(host: str, port: int) -> bool:
    """Whether a labelling page answers on the port.

    Raises:
        D3POError: another program does.
    """
    import socket

    import httpx

    address = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    try:
        with socket.create_connection((address, port), timeout=1):
            pass
    except OSError:
        return False
    try:
        url = f"http://{f'[{address}]' if ':' in address else address}:{port}/health"
        if httpx.get(url, timeout=3, trust_env=False).json() == {"service": "d3po label"}:
            return True
    except (httpx.HTTPError, ValueError):
        pass
    raise D3POError(f"port {port} of {host} is taken by another program; give the page another one: --port NUMBER")
