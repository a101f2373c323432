"""Put what a campaign's folder has, and its mirror lacks, into the mirror; each record last."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from d3po_core.config import StoreConfig
from d3po_core.errors import D3POError
from d3po_core.mirror.known import AT_ONCE, fetched_copies, lacking_places, require_same
from d3po_core.mirror.layout import STAGES, Piece, StageCopy, object_name, packed, place_of, stage_copy
from d3po_core.mirror.lease import Lease
from d3po_core.mirror.objects import Objects
from d3po_core.mirror.state import Place, read_state, write_state
from d3po_core.mirror.versions import newest_version, put_version, require_same_campaign
from d3po_core.store.integrity import listed_files, sha256_of
from d3po_core.store.stages import stage_path

# One small picture per stage; the report and MLflow on the next machine show them.
OVERVIEWS = ("/contact_sheet.png", "/grid.png")


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
    before, state = newest_version(objects), read_state(campaign)
    require_same_campaign(campaign, before, objects)
    lacking = lacking_places(campaign, objects, lease, state)
    new_version = put_version(campaign, before, objects, lease, state)
    write_state(campaign, state)
    put = 0
    for place in lacking:
        put += _put_stage(campaign, store, place, objects, lease)
        state.note(place)
        write_state(campaign, state)
    return Put(put, new_version)


def is_mirrored(name: str, store: StoreConfig) -> bool:
    """Return whether a file of a stage belongs into the mirror, by its path in the campaign."""
    if name.endswith(OVERVIEWS):
        return True
    kind = name.partition("/")[0]
    return {"images": store.mirror_images, "trajectories": store.mirror_trajectories}.get(kind, True)


def _put_stage(campaign: Path, store: StoreConfig, place: Place, objects: Objects, lease: Lease) -> bool:
    """Put a stage's files and then its record; return whether the record is new there."""
    number, stage = place[0], STAGES[place[1]]
    path = stage_path(campaign, number, stage)
    listed = path.with_suffix(".files").read_text()
    for there in fetched_copies([place], objects):  # the store's answer to an earlier put was lost
        require_same(campaign, there, objects)
        return False
    entries = {n: e for n, e in listed_files(campaign, number, stage).items() if campaign / n != path}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        pieces = pool.map(lambda item: put_file(campaign, item[0], item[1], store, objects), entries.items())
        files = dict(zip(entries, pieces, strict=True))
    copy = StageCopy(number, stage, path.read_text() if path.exists() else None, listed, files)
    lease.require()
    if not objects.create(copy.name, packed(copy)):
        require_same(campaign, stage_copy(objects.get(copy.name) or b"", f"{objects.shown}/{copy.name}"), objects)
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


def forget_round(campaign: Path, round_number: int, objects: Objects, lease: Lease) -> None:
    """Delete a dropped round's records from the mirror, so that it can be made again."""
    lease.require()
    state = read_state(campaign)
    state.forget(round_number)
    write_state(campaign, state)  # first: notes that lack a record are mended, notes of one that is gone are not
    names = [entry.name for entry in objects.listed(f"records/round={round_number}/")]
    for name in sorted(names, key=lambda name: place_of(name) or (0, 0), reverse=True):  # the last stage first
        objects.delete(name)
