"""One writer: a lease by create-only puts, which expires by the store's own clock.

Each holding is an object ``lease/<number>.json``. Who creates the number after the highest one has the lease. A renewal
creates the next number, and the holder then deletes older ones. A slow machine could create a number that was taken and
deleted meanwhile, so after creating one we look whether a higher one exists.

A term lasts as long as nobody but one folder holds the lease, however often it is renewed, given back and taken again.
What a folder knows of the mirror stays true within a term.
"""

import json
import os
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime, timedelta

from d3po_core.errors import D3POError
from d3po_core.mirror.holder import Holding, Newest, holding_of, who_am_i
from d3po_core.mirror.layout import lease_name, numbered, numbers_in
from d3po_core.mirror.objects import Objects
from d3po_core.mirror.probing import require_conditions, store_time

# S3 tells times in whole seconds.
ROUNDING = timedelta(seconds=1)
TRIES = 5


class LeaseHeldError(D3POError):
    """Another machine writes this campaign."""


class LeaseLostError(D3POError):
    """Another machine took the campaign over; nothing more may be published from here."""


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
            D3POError: the store overwrites what it was told to keep, so no lease in it means anything.
        """
        for _ in range(TRIES):
            newest = self.newest()
            own = newest is not None and self.is_own(newest)
            if not own and self.number is not None:
                raise LeaseLostError(self._lost(newest))
            if newest and not own and newest.holding.seconds and not self.is_over(newest):
                raise LeaseHeldError(self._held(newest))
            if not own:
                require_conditions(self._objects)
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
                return Newest(number, holding_of(content), found[number].modified)
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
        return store_time(self._objects) > self.ends(newest)

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
