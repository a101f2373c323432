"""Links to the labelling page: its address, raters' links and the owner's; and lines on rounds that wait for people."""

import os
import sys
from pathlib import Path

from d3po_core.errors import D3POError
from d3po_core.paths import data_folder

DEFAULT_PORT = 8700


def page_port() -> int:
    """Port of the labelling page: that of ``d3po up`` now or last time, else the usual one."""
    from d3po.flows.server_processes import known_ports

    return known_ports().get("label", DEFAULT_PORT)


def page_root() -> str:
    """Address of the labelling page: ``D3PO_LABEL_URL``, else on the port of ``page_port``."""
    return os.environ.get("D3PO_LABEL_URL") or f"http://127.0.0.1:{page_port()}"


def rater_link(token: str) -> str:
    """A rater's link."""
    return f"{page_root()}/enter?key={token}"


def owner_line(root: str | None = None, shown: bool | None = None) -> str:
    """The line with the owner's link; where others may read it, such as in a log, how to get the link.

    Args:
        root: address of the page; by default ``page_root``.
        shown: whether to show the link; by default only in a terminal.

    Raises:
        D3POError: the data folder cannot be written.
    """
    from d3po_core.page.access import Raters

    root = root or page_root()
    if not (sys.stdout.isatty() if shown is None else shown):
        return f"Owner's page: {root}/owner (in a terminal, d3po label prints the link)"
    return f"Owner's page: {root}/owner/enter?key={Raters(data_folder()).owner_token()}"


def waiting_lines(campaign: Path | None = None) -> list[str]:
    """Lines on what waits for people, and for whom: in one campaign's folder, or in all of the data folder by name.

    A campaign that cannot be read gets a line with the reason.
    """
    from d3po_core.page.access import Raters
    from d3po_core.people.waiting import campaign_now, open_round, waiting_line
    from d3po_core.store.campaign import campaign_names

    raters, lines = Raters(data_folder()), []
    folders = [campaign] if campaign else [data_folder() / "runs" / name for name in campaign_names()]
    for folder in folders:
        name = "" if campaign else f"campaign {folder.name}: "
        try:
            if open_round(folder) is not None and (line := waiting_line(campaign_now(folder, raters.admitted(folder)))):
                lines.append(name + line)
        except D3POError as error:
            lines.append(f"{name}{error}")
    return lines
