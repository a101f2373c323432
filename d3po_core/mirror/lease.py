"""One writer: a lease by create-only puts, which expires by the store's own clock.

Each holding is an object ``lease/<number>.json``. Who creates the number after the highest one has the lease. A renewal
creates the next number, and the holder then deletes older ones. A slow machine could create a number that was taken and
deleted meanwhile, so after creating one we look whether a higher one exists.

A term lasts as long as nobody but one folder holds the lease, however often it is renewed, given back and taken again.
What a folder knows of the mirror stays true within a term.
"""

import getpass
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple

from d3po_core.errors import D3POError
from d3po_core.mirror.layout import lease_name, numbered, numbers_in
from d3po_core.mirror.objects import Objects
from d3po_core.store.files import atomic_path

HOLDER_FILE = ".mirror-holder.json"
# S3 tells times in whole seconds.
ROUNDING = timedelta(seconds=1)
TRIES = 5


class LeaseHeldError(D3POError):
    """Another machine writes this campaign."""


class LeaseLostError(D3POError):
    """Another machine took the campaign over; nothing more may be published from here."""


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


class Lease:
    """The right to write one campaign in a mirror, for all processes of one folder on one machine.

    Args:
        objects: the campaign's objects.
        holder: id of the folder on this machine; see ``holder_of``.
        campaign: the campaign's name.
        seconds: how long a lease lasts after its last renewal.
        clock: seconds that only grow.
    """

    def __init__(
        self, objects: Objects, holder: str, campaign: str, seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._objects, self._holder, self._campaign, self._seconds = objects, holder, campaign, seconds
        self._clock, self._since = clock, datetime.now(UTC).isoformat(timespec="seconds")
        self.number: int | None = None
        self.term = ""
        self._renewed_at = 0.0
        self._lock = threading.RLock()

    def take(self) -> bool:
        """Take the lease; return whether it is new here, False if this folder held it already.

        Raises:
            LeaseHeldError: another machine holds it.
            LeaseLostError: this process had it, and another machine took it since.
            MirrorAwayError: the store does not answer.
        """
        for _ in range(TRIES):
            newest = self.newest()
            own = newest is not None and self.is_own(newest)
            if not own and self.number is not None:
                raise LeaseLostError(self._lost(newest))
            if newest and not own and newest.holding.seconds and not self.is_over(newest):
                raise LeaseHeldError(self._held(newest))
            self.term = (newest.holding.term if newest and own else "") or uuid.uuid4().hex
            if self._create(newest.number + 1 if newest else 1, self._seconds):
                return not own
        raise LeaseHeldError(f"the lease of {self._objects.shown} changes hands too fast; try again in a minute")

    def require(self) -> None:
        """Ask the store whether the lease is ours for long enough to put one object; renew it if half of it is over.

        Raises:
            LeaseLostError: another machine has it.
            MirrorAwayError: the store does not answer.
        """
        with self._lock:  # the run and the thread that renews both ask
            if self.number is None or self._clock() - self._renewed_at > self._seconds / 2:
                self.take()
            # Our own clock may have stood still with this machine, and another one has the lease since.
            elif max(self._numbers(), default=0) != self.number:
                newest = self.newest()
                if newest is None or not self.is_own(newest):
                    raise LeaseLostError(self._lost(newest))
                # Another process of this folder renewed it, or took it back from another machine.
                self.number, self.term = newest.number, newest.holding.term

    def release(self) -> None:
        """Give the lease back, if it is ours, so that another machine need not wait for its end."""
        newest = self.newest()
        if self.number is not None and newest and self.is_own(newest):
            self._create(newest.number + 1, 0.0)
        self.number = None

    def newest(self) -> Newest | None:
        """Return the newest lease, None if there never was one."""
        for _ in range(TRIES):
            found = {numbered(entry.name): entry for entry in self._objects.listed("lease/")}
            number = max((n for n in found if n is not None), default=None)
            if number is None:
                return None
            content = self._objects.get(lease_name(number))
            if content is not None:  # else it was renewed, and deleted, in between
                return Newest(number, _holding(content), found[number].modified)
        raise LeaseHeldError(f"the lease of {self._objects.shown} is renewed faster than it can be read; try again")

    def ends(self, newest: Newest) -> datetime:
        """Return when a lease can be taken over, by the store's clock."""
        return newest.modified + timedelta(seconds=newest.holding.seconds) + ROUNDING

    def _create(self, number: int, seconds: float) -> bool:
        """Create a lease of that number; return whether it is ours and the newest."""
        began = self._clock()
        mine = Holding(self._holder, who_am_i(), os.getpid(), self._campaign, self._since, seconds, self.term)
        if not self._objects.create(lease_name(number), json.dumps(asdict(mine)).encode()):
            return False
        there = self._numbers()
        if max(there, default=0) > number:
            self._objects.delete(lease_name(number))
            return False
        self.number, self._renewed_at = number, began
        for older in there:
            if older < number:
                self._objects.delete(lease_name(older))
        return True

    def _numbers(self) -> list[int]:
        return numbers_in(entry.name for entry in self._objects.listed("lease/"))

    def is_own(self, newest: Newest) -> bool:
        """Return whether a lease is this folder's."""
        return newest.holding.holder == self._holder

    def is_over(self, newest: Newest) -> bool:
        """Return whether a lease has run out, by the store's clock."""
        return self._store_time() > self.ends(newest)

    def _store_time(self) -> datetime:
        """Return the store's clock: the time of an object that is written now."""
        probe = f"clock/{uuid.uuid4().hex}"
        self._objects.create(probe, b"what time is it")
        modified = self._objects.modified(probe)
        self._objects.delete(probe)
        return modified or datetime.now(UTC)

    def _held(self, newest: Newest) -> str:
        holding, ends = newest.holding, self.ends(newest)
        return (
            f"campaign {self._campaign!r} is written from {holding.who} (process {holding.pid}) since "
            f"{holding.since}; end that run, or take the campaign over after {ends:%Y-%m-%d %H:%M:%S} UTC by the "
            "store's clock, if that machine is lost"
        )

    def _lost(self, newest: Newest | None) -> str:
        who = f"{newest.holding.who} took it over" if newest else "its lease was deleted"
        return (
            f"campaign {self._campaign!r} is no longer written from here: {who} at {self._objects.shown}; nothing more "
            "is published. To go on here, end the other run and type the same command again"
        )


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


def _holding(content: bytes) -> Holding:
    try:
        return Holding(**json.loads(content))
    except (ValueError, TypeError):
        return Holding("?", "an unknown writer", 0, "?", "an unknown time", 600.0)
