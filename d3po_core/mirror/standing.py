"""How a campaign and its mirror stand: what is there, what is missing, and who writes."""

from pathlib import Path
from typing import Any

from d3po_core.mirror.known import finished_places
from d3po_core.mirror.layout import STAGES, place_of
from d3po_core.mirror.lease import Lease
from d3po_core.mirror.objects import Listed, Objects
from d3po_core.mirror.versions import newest_version

REQUESTS_PER_STAGE = 5  # besides the puts


def standing(campaign: Path, objects: Objects, lease: Lease) -> dict[str, Any]:
    """Return what a mirror holds, what it lacks of the folder, its size, its cost, its lease."""
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
        **_per_round(everything),
        "writer": None if free or newest is None else f"{newest.holding.who} since {newest.holding.since}",
        "lease_ends": None if free or newest is None else lease.ends(newest).isoformat(timespec="seconds"),
    }


def _per_round(everything: list[Listed]) -> dict[str, Any]:
    """Return objects and bytes of a published round on average, and an estimate of the requests that put them."""
    rounds = {entry.name.split("/")[1] for entry in everything if entry.name.endswith("/publish.json")}
    rounds.discard("round=0")  # it has fewer stages
    within = [entry for entry in everything if rounds.intersection(entry.name.split("/"))]
    if not rounds:
        return {"objects_per_round": None, "bytes_per_round": None, "requests_per_round": None}
    stages = sum(entry.name.startswith("records/") for entry in within)
    # A put per object; per stage two looks at the lease, a list and a read of the versions, and a read of the record.
    requests = len(within) + REQUESTS_PER_STAGE * stages
    return {
        "objects_per_round": round(len(within) / len(rounds)),
        "bytes_per_round": round(sum(entry.bytes for entry in within) / len(rounds)),
        "requests_per_round": round(requests / len(rounds)),
    }


def _named(place: tuple[int, int]) -> str:
    return f"round {place[0]} {STAGES[place[1]]}"
