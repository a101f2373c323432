"""Bring a campaign from its mirror into a folder; what the folder has more stays, and nothing is overwritten."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from d3po_core.config import StoreConfig
from d3po_core.errors import D3POError
from d3po_core.mirror.known import AT_ONCE, fetched_copies, finished_places, mirrored_places, require_same
from d3po_core.mirror.layout import REPAIR, Piece, StageCopy, Version
from d3po_core.mirror.objects import Objects
from d3po_core.mirror.state import DivergedError, State, read_state, write_state
from d3po_core.mirror.versions import journal_entries, newest_version, require_same_campaign
from d3po_core.people.journal import restore_rows
from d3po_core.store.files import atomic_path
from d3po_core.store.integrity import LEFT_OUT, sha256_of
from d3po_core.store.stages import stage_path

SET_ASIDE = ".set-aside"


class Pulled(NamedTuple):
    """The result of a pull: how much it brought, and how many files the mirror never had."""

    stages: int
    files: int
    entries: int
    left_out: int

    @property
    def in_words(self) -> str:
        """Return what came, for a person."""
        said = f"{self.stages} stages, {self.files} files"
        said += f", {self.entries} judgements of the page" if self.entries else ""
        return said + (f"; {self.left_out} images and trajectories were never there" if self.left_out else "")


def pull_campaign(campaign: Path, store: StoreConfig, objects: Objects) -> Pulled | None:
    """Bring what the folder lacks; return what came, None if the mirror has no such campaign.

    The caller holds the campaign's lock.

    Raises:
        MirrorAwayError: the store does not answer; what came so far is whole, and the next call brings the rest.
        DivergedError: folder and mirror hold different content under one name; nothing was changed.
        D3POError: an object is gone or damaged.
    """
    found, state = newest_version(objects), read_state(campaign)
    require_same_campaign(campaign, found, objects)
    if found is None:
        return None
    here = set(finished_places(campaign))
    unknown = [place for place in sorted(mirrored_places(objects)) if not state.knows(place)]
    copies = fetched_copies(unknown, objects)
    for copy in copies:
        if copy.place in here:
            require_same(campaign, copy, objects)
    changed = _changed_outside(campaign, found, state)
    state.store = store.model_dump(mode="json")
    # The journal first: without it, files that were written from it would look like those of a lost one.
    entries = restore_rows(campaign, journal_entries(found, objects), found.notes) if found.journal else 0
    _fetch_all(campaign, changed, objects)
    state.version, state.files = found.number, {name: piece.sha256 for name, piece in found.files.items()}
    write_state(campaign, state)
    files, stages, left_out = len(changed), 0, 0
    for copy in copies:
        if copy.place not in here:
            files += _write_stage(campaign, copy, objects)
            left_out += sum(piece.object is None for piece in copy.files.values())
            stages += 1
        state.note(copy.place)
        write_state(campaign, state)
    return Pulled(stages, files, entries, left_out)


def _changed_outside(campaign: Path, found: Version, state: State) -> dict[str, Piece]:
    """Return the files outside stages to bring: missing ones, and those that changed only in the mirror.

    Raises:
        DivergedError: a file changed on both sides.
    """
    wanted = {}
    for name, piece in found.files.items() if found.number != state.version else ():
        path = campaign / name
        digest = sha256_of(path) if path.exists() else None
        if digest == piece.sha256 or (digest and piece.sha256 == state.files.get(name)):
            continue
        if digest and digest != state.files.get(name):
            raise DivergedError(
                f"{path}: changed here and in the mirror since the two met; nothing was changed. Move it away to take "
                "the mirror's"
            )
        wanted[name] = piece
    return wanted


def _write_stage(campaign: Path, copy: StageCopy, objects: Objects) -> int:
    """Bring a stage's files, then its list and its record; return the number of files that came."""
    row = f"rounds/round={copy.round}/part.parquet"  # it finishes the round, so it comes last
    present = {name: piece for name, piece in copy.files.items() if piece.object and name != row}
    came = _fetch_all(campaign, present, objects)
    lay_out_stage(campaign, copy)
    if row in copy.files:
        came += _fetch_all(campaign, {row: copy.files[row]}, objects)
    return came


def lay_out_stage(campaign: Path, copy: StageCopy) -> None:
    """Write a stage's list and its record, and mark the folders whose files the mirror leaves out."""
    for name, piece in copy.files.items():
        if piece.object is None and not (campaign / name).exists():
            marker = (campaign / name).parent / LEFT_OUT
            marker.parent.mkdir(parents=True, exist_ok=True)
            marker.touch()
    path = stage_path(campaign, copy.round, copy.stage)
    texts = [(path.with_suffix(".files"), copy.listed)]
    if copy.record is not None:
        texts.append((path, copy.record))
    for target, text in texts:
        with atomic_path(target) as temporary:
            temporary.write_text(text)


def _fetch_all(campaign: Path, pieces: dict[str, Piece], objects: Objects) -> int:
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return sum(pool.map(lambda item: _fetch(campaign, item[0], item[1], objects), pieces.items()))


def fetch_piece(objects: Objects, name: str, piece: Piece, path: Path) -> None:
    """Write a file of the campaign, called ``name`` there, to a path.

    Raises:
        MirrorAwayError: the store does not answer.
        D3POError: its object is gone or damaged.
    """
    if not objects.fetch(piece.object or "", path) or sha256_of(path) != piece.sha256:
        raise D3POError(f"{objects.shown}/{piece.object}: is gone or damaged, and {name} is needed; {REPAIR}")


def _fetch(campaign: Path, name: str, piece: Piece, objects: Objects) -> bool:
    """Bring a file, unless it is here; set another one of that name, which no stage finished, aside."""
    path = campaign / name
    if path.exists():
        if sha256_of(path) == piece.sha256:
            return False
        aside = campaign / SET_ASIDE / name
        aside.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        fetch_piece(objects, name, piece, temporary)
        if path.exists():
            os.replace(path, aside)
    return True
