"""Keep the campaign's mirror up to date during a run; a store that is away costs seconds, never a round."""

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from d3po.tasks.logs import run_logger
from d3po_core.config import CampaignConfig
from d3po_core.errors import D3POError
from d3po_core.mirror.lease import LeaseHeldError, LeaseLostError
from d3po_core.mirror.objects import MirrorAwayError, check_url
from d3po_core.mirror.opening import open_mirror
from d3po_core.mirror.pulling import pull_campaign
from d3po_core.mirror.putting import put_campaign
from d3po_core.mirror.state import LOCK_FILE, remember_mirror
from d3po_core.store.campaign import CAMPAIGN_FILE
from d3po_core.store.files import exclusive

# After a failure, leave the store alone for so many times as long as the failed delivery took.
PAUSE = 10
_sessions: dict[Path, "Session"] = {}


class Session:
    """A run's hold on the mirror of its campaign; the caller holds the campaign's lock.

    Args:
        config: the campaign's, with ``store.mirror`` set.
    """

    def __init__(self, config: CampaignConfig) -> None:
        self._config, self._folder, self._log = config, config.folder, run_logger()
        self.objects, self.lease = open_mirror(config)
        self._lost: LeaseLostError | None = None
        self._away, self._left_alone_until = False, 0.0
        self._over = threading.Event()

    def begin(self) -> None:
        """Take the lease, bring what the folder lacks, and keep the lease until ``end``.

        Raises:
            LeaseHeldError: another machine writes the campaign.
            D3POError: the store is away and the folder has no campaign, so nobody knows where it stands.
        """
        remember_mirror(self._folder, self._config.store)
        try:
            self.lease.take()
            pulled = pull_campaign(self._folder, self._config.store, self.objects)
        except MirrorAwayError as error:
            if not (self._folder / CAMPAIGN_FILE).exists():
                raise D3POError(
                    f"{error}; campaign {self._config.campaign!r} is not on this machine, so it cannot be told whether "
                    "it is new. Try again when the store answers, or leave store.mirror out to begin a new one"
                ) from None
            self._warn(error)
            pulled = None
        if pulled and (pulled.stages or pulled.entries):
            self._log.info("from the mirror %s: %s", self.objects.shown, pulled.in_words)
        threading.Thread(target=self._renew, name="mirror-lease", daemon=True).start()

    def deliver(self) -> None:
        """Put what the mirror lacks, unless the store failed a moment ago.

        Raises:
            LeaseLostError: another machine took the campaign over.
            D3POError: the folder and the mirror hold different stages.
        """
        self.require()
        began = time.monotonic()
        if began < self._left_alone_until:
            return
        try:
            with exclusive(self._folder / LOCK_FILE):
                put_campaign(self._folder, self._config.store, self.objects, self.lease)
        except MirrorAwayError as error:
            self._left_alone_until = time.monotonic() + PAUSE * (time.monotonic() - began)
            self._warn(error)
            return
        if self._away:
            self._away = False
            self._log.info("the mirror %s answers again and has everything", self.objects.shown)

    def require(self) -> None:
        """Check that the lease was not lost at its last renewal; the store is not asked.

        Raises:
            LeaseLostError: another machine took the campaign over.
        """
        if self._lost:
            raise self._lost

    def end(self) -> None:
        """Put what is left, and give the lease back."""
        self._over.set()
        self._left_alone_until = 0.0
        try:
            self.deliver()
            self.lease.release()
        except MirrorAwayError as error:
            self._warn(error)

    def leave(self) -> None:
        """Stop renewing the lease."""
        self._over.set()

    def _renew(self) -> None:
        while not self._over.wait(self._config.store.lease_seconds / 4):
            try:
                self.lease.require()
            except (LeaseLostError, LeaseHeldError) as error:
                self._lost = LeaseLostError(str(error))  # the stage ends with it, at its next sign of progress
                return
            except Exception:  # the next delivery says what is wrong
                continue

    def _warn(self, error: MirrorAwayError) -> None:
        if not self._away:
            self._away = True
            self._log.warning("%s; the run goes on, and what is missing there is put later (or: d3po push)", error)


@contextlib.contextmanager
def mirrored(config: CampaignConfig) -> Iterator[None]:
    """Within this context, ``deliver`` keeps the campaign's mirror up to date; without ``store.mirror``, do nothing."""
    if config.store.mirror is None:
        yield
        return
    check_url(config.store.mirror)
    session = Session(config)
    session.begin()
    _sessions[config.folder] = session
    try:
        yield
    except LeaseLostError:
        session.leave()
        raise
    except BaseException:  # also a run that is suspended
        with contextlib.suppress(D3POError):
            session.end()
        raise
    else:
        session.end()
    finally:
        del _sessions[config.folder]


def deliver(config: CampaignConfig) -> None:
    """Put what the campaign's mirror lacks; without a mirror, do nothing.

    Raises:
        LeaseLostError: another machine took the campaign over.
    """
    if session := _sessions.get(config.folder):
        session.deliver()


def require_lease(campaign: Path) -> None:
    """Check, in the middle of a stage, that no other machine took the campaign over; without a mirror, do nothing.

    Raises:
        LeaseLostError: one did.
    """
    if session := _sessions.get(campaign):
        session.require()
