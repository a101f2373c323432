"""Which finished stages a mirror lacks: a delivery looks at new ones only, however long the campaign is.

The folder's notes (``State``) say which stages both sides have. The store is asked whether it still has them once per
process, and again when another machine may have written, which is when the lease was taken anew (``Lease.term``).
"""

import itertools
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from d3po_core.errors import D3POError
from d3po_core.mirror.layout import STAGES, StageCopy, place_of, record_name, stage_copy
from d3po_core.mirror.lease import Lease
from d3po_core.mirror.objects import Objects
from d3po_core.mirror.state import PUBLISH, DivergedError, Place, State, write_state
from d3po_core.store.stages import stage_path
from d3po_core.store.tables import partition

AT_ONCE = 8
# Campaign -> the mirror, and the lease's term, whose records were compared with the folder's notes.
_compared: dict[Path, tuple[str, str]] = {}


def lacking_places(campaign: Path, objects: Objects, lease: Lease, state: State) -> list[Place]:
    """Return the finished stages that the mirror lacks, in order; the caller holds the lease.

    Args:
        campaign: the campaign's folder.
        objects: the campaign's objects.
        lease: the right to write, just checked.
        state: the folder's notes; they are corrected, and written, when the store is asked.

    Raises:
        MirrorAwayError: the store does not answer.
        DivergedError: the mirror holds another content of a stage.
    """
    now = (objects.shown, lease.term)
    if state.version and _compared.get(campaign) == now:  # without a version, the notes were lost
        return [place for place in finished_places(campaign, state.whole) if not state.knows(place)]
    here, there = finished_places(campaign), mirrored_places(objects)
    unknown = [place for place in here if place in there and not state.knows(place)]
    for copy in fetched_copies(unknown, objects):
        require_same(campaign, copy, objects)
    lacking = [place for place in here if place not in there]
    state.note_only((place for place in here if place in there), lacking)
    write_state(campaign, state)
    _compared[campaign] = now
    return lacking


def finished_places(campaign: Path, after: int = -1) -> list[Place]:
    """Return the finished stages of the rounds after a round, in order; of all rounds by default.

    Raises:
        D3POError: a stage has no list of digests, as in campaigns of early versions.
    """
    found = []
    for number in rounds_begun(campaign, after):
        folder = campaign / "stages" / f"round={number}"
        for path in folder.glob("*.json"):
            if path.stem in STAGES:
                _require_list(path)
                found.append((number, STAGES.index(path.stem)))
        row = partition(campaign, "rounds", number) / "part.parquet"
        if (folder / "publish.files").exists() and row.exists():
            found.append((number, PUBLISH))
    return sorted(found)


def rounds_begun(campaign: Path, after: int = -1) -> Iterator[int]:
    """Yield the rounds after a round that have a folder of records, in order; by default all rounds."""
    stages = campaign / "stages"
    if after >= 0:  # rounds are made one after the other
        yield from itertools.takewhile(lambda n: (stages / f"round={n}").is_dir(), itertools.count(after + 1))
        return
    names = [path.name.removeprefix("round=") for path in stages.glob("round=*")]
    yield from sorted(int(name) for name in names if name.isdigit())


def mirrored_places(objects: Objects) -> set[Place]:
    """Return the stages whose records are in the mirror."""
    return {place for entry in objects.listed("records/") if (place := place_of(entry.name))}


def fetched_copies(places: Iterable[Place], objects: Objects) -> list[StageCopy]:
    """Return the records of stages in the mirror, in the order of their places; skip those that are gone."""
    names = [record_name(number, STAGES[order]) for number, order in places]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        contents = zip(names, pool.map(objects.get, names), strict=True)
        return [stage_copy(content, f"{objects.shown}/{name}") for name, content in contents if content is not None]


def require_same(campaign: Path, there: StageCopy, objects: Objects) -> None:
    """Check that a stage's record in the mirror is that of the folder's finished stage.

    Raises:
        DivergedError: it is another one.
    """
    listed = stage_path(campaign, there.round, there.stage).with_suffix(".files")
    if there.listed != listed.read_text():
        raise DivergedError(
            f"round {there.round} of campaign {campaign.name!r}: stage {there.stage} in {objects.shown} is not that "
            f"in {campaign}; somebody went on elsewhere. Nothing was changed: move this folder away and pull the "
            "mirror's, or give this one another mirror"
        )


def _require_list(record: Path) -> None:
    if not record.with_suffix(".files").exists():
        raise D3POError(
            f"{record}: has no digests beside it, so the campaign cannot be mirrored; start a new one, or copy "
            "its folder by hand"
        )
