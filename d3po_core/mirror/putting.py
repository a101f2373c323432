"""Put what a campaign's folder has, and its mirror lacks, into the mirror; each record last."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from d3po_core.config import StoreConfig
from d3po_core.errors import D3POError
from d3po_core.mirror.layout import (
    STAGES,
    Piece,
    StageCopy,
    object_name,
    packed,
    place_of,
    record_name,
    stage_copy,
)
from d3po_core.mirror.lease import Lease
from d3po_core.mirror.objects import Objects
from d3po_core.mirror.state import DivergedError, State, read_state, write_state
from d3po_core.mirror.versions import put_version
from d3po_core.store.integrity import listed_files, sha256_of
from d3po_core.store.stages import stage_path
from d3po_core.store.tables import partition

AT_ONCE = 8
# One small picture per stage; the report and MLflow on the next machine show them.
OVERVIEWS = ("/contact_sheet.png", "/grid.png")
Place = tuple[int, int]


class Put(NamedTuple):
    """The result of a delivery: how many stages it put, and whether it put a new version."""

    stages: int
    version: bool


def put_campaign(campaign: Path, store: StoreConfig, objects: Objects, lease: Lease) -> Put:
    """Put everything that the mirror lacks, in order.

    Raises:
        MirrorAwayError: the store did not take it all; the next call puts the rest.
        LeaseLostError: another machine writes the campaign now.
        DivergedError: the mirror holds another content of a stage.
        D3POError: a file is damaged, so it is not put.
    """
    lease.require()
    state = read_state(campaign)
    there = mirrored_places(objects)
    new_version = put_version(campaign, there, objects, lease, state)
    write_state(campaign, state)
    put = 0
    for place in finished_places(campaign):
        name = record_name(place[0], STAGES[place[1]])
        if place in there and name in state.records:
            continue
        put += _put_stage(campaign, store, place, objects, lease)
        state.records.append(name)
        write_state(campaign, state)
    return Put(put, new_version)


def finished_places(campaign: Path) -> list[Place]:
    """Return the finished stages, in order.

    Raises:
        D3POError: a stage has no list of digests, as in campaigns of early versions.
    """
    found = []
    for path in campaign.glob("stages/round=*/*.json"):
        if path.stem in STAGES:
            if not path.with_suffix(".files").exists():
                raise D3POError(
                    f"{path}: has no digests beside it, so the campaign cannot be mirrored; start a new one, or copy "
                    "its folder by hand"
                )
            found.append((_number(path), STAGES.index(path.stem)))
    published = map(_number, campaign.glob("stages/round=*/publish.files"))
    rows = [number for number in published if (partition(campaign, "rounds", number) / "part.parquet").exists()]
    return sorted(found + [(number, STAGES.index("publish")) for number in rows])


def is_mirrored(name: str, store: StoreConfig) -> bool:
    """Return whether a file of a stage belongs into the mirror, by its path in the campaign."""
    if name.endswith(OVERVIEWS):
        return True
    kind = name.partition("/")[0]
    return {"images": store.mirror_images, "trajectories": store.mirror_trajectories}.get(kind, True)


def _number(path: Path) -> int:
    return int(path.parent.name.removeprefix("round="))


def _put_stage(campaign: Path, store: StoreConfig, place: Place, objects: Objects, lease: Lease) -> bool:
    """Put a stage's files and then its record; return whether the record is new there."""
    number, stage = place[0], STAGES[place[1]]
    path = stage_path(campaign, number, stage)
    listed = path.with_suffix(".files").read_text()
    if (there := objects.get(record_name(number, stage))) is not None:
        _require_same(campaign, stage_copy(there, f"{objects.shown}/{record_name(number, stage)}"), listed, objects)
        return False
    entries = {n: e for n, e in listed_files(campaign, number, stage).items() if campaign / n != path}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        pieces = pool.map(lambda item: put_file(campaign, item[0], item[1], store, objects), entries.items())
        files = dict(zip(entries, pieces, strict=True))
    copy = StageCopy(number, stage, path.read_text() if path.exists() else None, listed, files)
    lease.require()
    if not objects.create(copy.name, packed(copy)):
        there = objects.get(copy.name)
        _require_same(campaign, stage_copy(there or b"", f"{objects.shown}/{copy.name}"), listed, objects)
    return True


def put_file(campaign: Path, name: str, entry: tuple[int, str], store: StoreConfig, objects: Objects) -> Piece:
    """Put a file under a name that holds its digest; return where it is."""
    path, (size, sha256) = campaign / name, entry
    if not is_mirrored(name, store) or (name.startswith(("trajectories/", "images/")) and not path.exists()):
        return Piece(sha256, size, None)
    if not path.is_file() or sha256_of(path) != sha256:
        raise D3POError(
            f"{path}: is not what its stage wrote, so it is not put into the mirror; restore it from a copy"
        )
    objects.create_file(object_name(name, sha256), path)
    return Piece(sha256, size, object_name(name, sha256))


def _require_same(campaign: Path, there: StageCopy, listed: str, objects: Objects) -> None:
    if there.listed != listed:
        raise DivergedError(diverged(campaign, there, objects))


def diverged(campaign: Path, there: StageCopy, objects: Objects) -> str:
    """Return the message that folder and mirror hold two different stages."""
    return (
        f"round {there.round} of campaign {campaign.name!r}: stage {there.stage} in {objects.shown} is not that "
        f"in {campaign}; somebody went on elsewhere. Nothing was changed: move this folder away and pull the mirror's, "
        "or give this one another mirror"
    )


def mirrored_places(objects: Objects) -> set[Place]:
    """Return the stages whose records are in the mirror."""
    return {place for entry in objects.listed("records/") if (place := place_of(entry.name))}


def forget_round(campaign: Path, round_number: int, objects: Objects, lease: Lease) -> None:
    """Delete a dropped round's records from the mirror, so that it can be made again."""
    lease.require()
    names = [entry.name for entry in objects.listed(f"records/round={round_number}/")]
    for name in sorted(names, key=lambda name: place_of(name) or (0, 0), reverse=True):  # the last stage first
        objects.delete(name)
    state: State = read_state(campaign)
    state.records = [name for name in state.records if name not in names]
    write_state(campaign, state)
