"""Open a campaign's mirror, and put what it lacks outside a run."""

from pathlib import Path

from d3po_core.config import CampaignConfig, StoreConfig
from d3po_core.mirror.holder import holder_of
from d3po_core.mirror.lease import Lease
from d3po_core.mirror.objects import Objects, open_objects
from d3po_core.mirror.putting import Put, forget_round, put_campaign
from d3po_core.mirror.state import LOCK_FILE, read_state, remember_mirror
from d3po_core.store.files import exclusive


def open_mirror(config: CampaignConfig) -> tuple[Objects, Lease]:
    """Return a campaign's objects and its lease, which is not taken yet.

    Raises:
        MirrorAwayError: the mirror is a folder that is not there.
        D3POError: the address is none.
    """
    return _opened(config.folder, config.campaign, config.store)


def push(config: CampaignConfig) -> tuple[Put, Objects]:
    """Put what the mirror lacks, outside a run; give the lease back if it was free before.

    Raises:
        D3POError: the store is away, or another machine writes the campaign.
    """
    objects, lease = open_mirror(config)
    remember_mirror(config.folder, config.store)
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
    objects, lease = _opened(campaign, campaign.name, store)
    with exclusive(campaign / LOCK_FILE):
        lease.take()
        try:
            forget_round(campaign, round_number, objects, lease)
            put_campaign(campaign, store, objects, lease)
        finally:
            lease.release()


def _opened(campaign: Path, name: str, store: StoreConfig) -> tuple[Objects, Lease]:
    assert store.mirror is not None, "only for campaigns that have a mirror"
    objects = open_objects(store.mirror, name, store.timeout_seconds)
    return objects, Lease(objects, holder_of(campaign), name, store.lease_seconds)


def _is_free(lease: Lease) -> bool:
    """Return whether no living run of this folder holds the lease."""
    newest = lease.newest()
    return newest is None or newest.holding.seconds == 0 or not lease.is_own(newest) or lease.is_over(newest)
