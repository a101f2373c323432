"""Who holds a lease: what a lease says of its holder, and the id of a folder on this machine."""

import getpass
import json
import os
import socket
import uuid
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

from d3po_core.store.files import atomic_path

HOLDER_FILE = ".mirror-holder.json"


@dataclass(frozen=True)
class Holding:
    """The content of a lease: its holder, since when, how long it lasts, its term; 0 seconds: it was given back."""

    holder: str
    who: str
    pid: int
    campaign: str
    since: str
    seconds: float
    term: str = ""


class Newest(NamedTuple):
    """The newest lease: its number, what it says, and the store's time of its writing."""

    number: int
    holding: Holding
    modified: datetime


def who_am_i() -> str:
    """Return user and machine, for a person."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def holder_of(campaign: Path) -> str:
    """Return the id of a campaign's folder on this machine; a copy of the folder elsewhere gets another one."""
    path, here = campaign / HOLDER_FILE, {"host": socket.gethostname(), "folder": str(campaign.resolve())}
    try:
        known = json.loads(path.read_text())
        if {key: known[key] for key in here} == here:
            return str(known["id"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    fresh = uuid.uuid4().hex
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps({"id": fresh, **here}))
    return fresh


def holding_of(content: bytes) -> Holding:
    """Return a lease's content from its bytes; of one that cannot be read, that of an unknown writer."""
    try:
        return Holding(**json.loads(content))
    except (ValueError, TypeError):
        return Holding("?", "an unknown writer", 0, "?", "an unknown time", 600.0)
