"""Keep the campaign's mirror up to date during a run; a store that is away costs seconds, never a round."""

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from d3po.tasks.logs import run_logger
from d3po_core.config import CampaignConfig
from d3po_core.errors import D3POError
from d3po_core.mirror.lease import Lease, LeaseHeldError, LeaseLostError, holder_of
from d3po_core.mirror.objects import MirrorAwayError, Objects, check_url, open_objects
from d3po_core.mirror.pulling import Pulled, pull_campaign
from d3po_core.mirror.putting import Put, forget_round, put_campaign
from d3po_core.mirror.state import LOCK_FILE, read_state, write_state
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
        state = read_state(self._folder)
        state.store = self._config.store.model_dump(mode="json")
        write_state(self._folder, state)
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
            self._log.info("from the mirror %s: %s", self.objects.shown, pulled_in_words(pulled))
        threading.Thread(target=self._renew, name="mirror-lease", daemon=True).start()

    def deliver(self) -> None:
        """Put what the mirror lacks, unless the store failed a moment ago.

        Raises:
            LeaseLostError: another machine took the campaign over.
            D3POError: the folder and the mirror hold different stages.
        """
        if self._lost:
            raise self._lost
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
                self._lost = LeaseLostError(str(error))
                self._log.error("%s", error)
                return
            except Exception:  # the next delivery says what is wrong
                continue

    def _warn(self, error: MirrorAwayError) -> None:
        if not self._away:
            self._away = True
            self._log.warning("%s; the run goes on, and what is missing there is put later (or: d3po push)", error)


def open_mirror(config: CampaignConfig) -> tuple[Objects, Lease]:
    """Return a campaign's objects and its lease, which is not taken yet.

    Raises:
        MirrorAwayError: the mirror is a folder that is not there.
        D3POError: the address is none.
    """
    store = config.store
    assert store.mirror is not None, "only for campaigns that have a mirror"
    objects = open_objects(store.mirror, config.campaign, store.timeout_seconds)
    return objects, Lease(objects, holder_of(config.folder), config.campaign, store.lease_seconds)


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


def push(config: CampaignConfig) -> tuple[Put, Objects]:
    """Put what the mirror lacks, outside a run; give the lease back if it was free before.

    Raises:
        D3POError: the store is away, or another machine writes the campaign.
    """
    objects, lease = open_mirror(config)
    state = read_state(config.folder)
    state.store = config.store.model_dump(mode="json")
    write_state(config.folder, state)
    with exclusive(config.folder / LOCK_FILE):
        fresh = _is_free(lease)
        lease.take()
        try:
            return put_campaign(config.folder, config.store, objects, lease), objects
        finally:
            if fresh:
                lease.release()


def forget_in_mirror(campaign: Path, round_number: int) -> None:
    """Delete a dropped round's records from the campaign's mirror; without a mirror, do nothing.

    Raises:
        D3POError: the store is away, or another machine writes the campaign; the same command tries again.
    """
    store = read_state(campaign).config
    if store.mirror is None:
        return
    objects = open_objects(store.mirror, campaign.name, store.timeout_seconds)
    lease = Lease(objects, holder_of(campaign), campaign.name, store.lease_seconds)
    with exclusive(campaign / LOCK_FILE):
        lease.take()
        try:
            forget_round(campaign, round_number, objects, lease)
            put_campaign(campaign, store, objects, lease)
        finally:
            lease.release()


def _is_free(lease: Lease) -> bool:
    """Return whether no living run of this folder holds the lease."""
    newest = lease.newest()
    return newest is None or newest.holding.seconds == 0 or not lease.is_own(newest) or lease.is_over(newest)


def pulled_in_words(pulled: Pulled) -> str:
    """Return what was pulled, for a person."""
    said = f"{pulled.stages} stages, {pulled.files} files"
    said += f", {pulled.entries} judgements of the page" if pulled.entries else ""
    return said + (f"; {pulled.left_out} images and trajectories were never there" if pulled.left_out else "")
