"""How a campaign and its mirror stand: what is there, what is missing, and who writes."""

from pathlib import Path
from typing import Any

from d3po_core.mirror.layout import STAGES, place_of
from d3po_core.mirror.lease import Lease
from d3po_core.mirror.objects import Objects
from d3po_core.mirror.putting import finished_places
from d3po_core.mirror.versions import newest_version


def standing(campaign: Path, objects: Objects, lease: Lease) -> dict[str, Any]:
    """Return what a mirror holds, what it lacks of the folder, its size, and its lease, by name."""
    everything = objects.listed("")
    there = sorted(place for entry in everything if (place := place_of(entry.name)))
    here, found, newest = finished_places(campaign), newest_version(objects), lease.newest()
    missing = [place for place in here if place not in there]
    free = newest is None or not newest.holding.seconds or lease.is_over(newest)
    return {
        "campaign_id": found.campaign if found else None,
        "last_stage": _named(there[-1]) if there else None,
        "stages": len(there),
        "missing_there": len(missing),
        "first_missing": _named(missing[0]) if missing else None,
        "missing_here": len(set(there) - set(here)),
        "version": found.number if found else None,
        "objects": len(everything),
        "bytes": sum(entry.bytes for entry in everything),
        "writer": None if free or newest is None else f"{newest.holding.who} since {newest.holding.since}",
        "lease_ends": None if free or newest is None else lease.ends(newest).isoformat(timespec="seconds"),
    }


def _named(place: tuple[int, int]) -> str:
    return f"round {place[0]} {STAGES[place[1]]}"
