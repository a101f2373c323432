"""Read a mirrored campaign without pulling it: records are laid out in a cache, other files come on first need.

Nothing here writes to the mirror or looks at its lease. A name in a mirror never changes content, so a file that is in
the cache, with the digest that its record tells, is never fetched again.
"""

import hashlib
import json
import shutil
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from d3po_core.config import CampaignConfig
from d3po_core.errors import D3POError
from d3po_core.mirror.known import AT_ONCE
from d3po_core.mirror.layout import Piece, StageCopy, Version, place_of, stage_copy
from d3po_core.mirror.objects import Objects, check_url, open_objects
from d3po_core.mirror.outside import OUTSIDE
from d3po_core.mirror.pulling import fetch_piece, lay_out_stage
from d3po_core.mirror.versions import journal_entries, newest_version
from d3po_core.paths import data_folder
from d3po_core.people.journal import restore_rows
from d3po_core.store.at_hand import serve
from d3po_core.store.campaign import CAMPAIGN_FILE, campaign_id, campaign_named
from d3po_core.store.files import atomic_path, exclusive
from d3po_core.store.integrity import sha256_of
from d3po_core.urls import masked

KEPT_RECORDS = ".records"
SEEN_FILE = ".seen.json"  # when the store says that each record was written, and the version that was read last


class MirrorSource:
    """The files of a mirrored campaign, by their paths in it.

    Args:
        folder: where they are put.
        pieces: all files that the mirror knows.
        objects: the campaign's objects.
    """

    def __init__(self, folder: Path, pieces: dict[str, Piece], objects: Objects) -> None:
        self._folder, self._pieces, self.objects = folder, pieces, objects
        self.shown = objects.shown
        self._lacking: set[str] = set()

    def bring(self, names: Iterable[str]) -> None:
        """Bring files that are not in the cache yet; ignore unknown ones and those that were left out.

        Raises:
            MirrorAwayError: the store does not answer.
            D3POError: an object is gone or damaged.
        """
        wanted = [name for name in dict.fromkeys(names) if (piece := self._pieces.get(name)) and piece.object]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(self._fetch, wanted))

    def tables(self, tables: Collection[str], rounds: Collection[int] | None) -> list[str]:
        """Return the names of tables' files, of the given rounds or of all."""
        folders = None if rounds is None else {f"round={number}" for number in rounds}
        found = []
        for name in self._pieces:
            table, _, inner = name.partition("/")
            if (
                table in tables
                and name.endswith(".parquet")
                and (folders is None or inner.partition("/")[0] in folders)
            ):
                found.append(name)
        return found

    def lacks(self, names: Iterable[str]) -> int:
        """Return how many of these files were left out of the mirror."""
        lacking = {name for name in names if name in self._pieces and self._pieces[name].object is None}
        self._lacking |= lacking
        return len(lacking)

    @property
    def lacking(self) -> int:
        """Return how many files were asked for that the mirror does not have."""
        return len(self._lacking)

    def _fetch(self, name: str) -> None:
        path, piece = self._folder / name, self._pieces[name]
        if path.is_file() and sha256_of(path) == piece.sha256:
            return
        with atomic_path(path) as temporary:
            fetch_piece(self.objects, name, piece, temporary)


def campaign_at(name: str) -> CampaignConfig:
    """Return the configuration of a campaign on disk, or of a mirrored one that is read from its mirror.

    Args:
        name: a campaign's name or folder, or the address of a mirrored campaign.

    Raises:
        MirrorAwayError: the store does not answer.
        D3POError: there is no such campaign.
    """
    return campaign_named(str(lay_out(name)) if "://" in name else name)


def split_url(url: str) -> tuple[str, str]:
    """Return the mirror's address and the campaign's name.

    Raises:
        D3POError: the address is no mirrored campaign's.
    """
    base, _, name = url.rstrip("/").rpartition("/")
    if not name or not base.partition("://")[2]:
        raise D3POError(f"{masked(url)!r} names no campaign in a mirror; expected such as s3://BUCKET/PREFIX/CAMPAIGN")
    check_url(base)
    return base, name


def lay_out(url: str) -> Path:
    """Return the cache's folder of a mirrored campaign, with its records up to date; other files come when needed.

    Raises:
        MirrorAwayError: the store does not answer.
        D3POError: there is no campaign at the address.
    """
    base, name = split_url(url)
    objects = open_objects(base, name)
    found = newest_version(objects)
    if found is None:  # before the folder is made
        raise D3POError(f"{objects.shown} holds no campaign; look at the address: store.mirror/CAMPAIGN")
    digest = hashlib.sha256(f"{base}/{name}".encode()).hexdigest()[:16]
    folder = data_folder() / "cache" / "mirrors" / digest / name
    with exclusive(folder.parent / ".lock"):
        if (folder / CAMPAIGN_FILE).exists() and campaign_id(folder) != found.campaign:
            shutil.rmtree(folder)  # another campaign began under the same address
        _bring_up_to_date(folder, found, objects)
    return folder


def _bring_up_to_date(folder: Path, found: Version, objects: Objects) -> None:
    """Lay out stages and what lies outside them, remove what the mirror dropped, and serve the rest on need."""
    seen = _seen(folder)
    copies = list(_copies(folder, objects, seen))
    staged = {name: piece for copy in copies for name, piece in copy.files.items()}
    # A guideline's image may be in the version alone.
    pieces = {**staged, **{name: piece for name, piece in found.files.items() if not _is_there(staged.get(name))}}
    _drop_stale(folder, {*pieces, *(name for copy in copies for name in _texts(copy))})
    for copy in copies:
        if not all((folder / name).exists() for name in _texts(copy)):
            lay_out_stage(folder, copy)
    source = MirrorSource(folder, pieces, objects)
    source.bring(name for name in found.files if name.endswith(".json"))
    if found.journal and seen.get("version") != str(found.number):
        restore_rows(folder, journal_entries(found, objects), found.notes)
    with atomic_path(folder / SEEN_FILE) as temporary:
        temporary.write_text(json.dumps({**seen, "version": str(found.number)}))
    serve(folder, source)


def _copies(folder: Path, objects: Objects, seen: dict[str, str]) -> Iterator[StageCopy]:
    """Yield the mirror's stages, in order; fetch those that the cache lacks, or that were written anew since."""
    written = {entry.name: str(entry.modified) for entry in objects.listed("records/") if place_of(entry.name)}
    kept = {name: folder / KEPT_RECORDS / name for name in sorted(written, key=lambda name: place_of(name) or (0, 0))}
    new = [name for name, path in kept.items() if seen.get(name) != written[name] or not path.exists()]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for name, content in zip(new, pool.map(objects.get, new), strict=True):
            if content is None:  # the round was dropped a moment ago
                del kept[name]
                continue
            with atomic_path(kept[name]) as temporary:
                temporary.write_bytes(content)
            stage = stage_copy(content, f"{objects.shown}/{name}")
            for text in _texts(stage):
                (folder / text).unlink(missing_ok=True)
    seen.clear()
    seen.update({name: written[name] for name in kept})
    yield from (stage_copy(path.read_bytes(), f"{objects.shown}/{name}") for name, path in kept.items())


def _is_there(piece: Piece | None) -> bool:
    return piece is not None and piece.object is not None


def _texts(copy: StageCopy) -> list[str]:
    start = f"stages/round={copy.round}/{copy.stage}"
    return [f"{start}.files"] if copy.record is None else [f"{start}.files", f"{start}.json"]


def _drop_stale(folder: Path, kept: set[str]) -> None:
    """Remove what the mirror does not hold any more, such as the note on a round that waited."""
    for pattern in (*OUTSIDE, "*/round=*/*.parquet", "stages/round=*/*"):
        for path in folder.glob(pattern):
            if path.relative_to(folder).as_posix() not in kept:
                path.unlink(missing_ok=True)


def _seen(folder: Path) -> dict[str, str]:
    try:
        return dict(json.loads((folder / SEEN_FILE).read_text()))
    except (OSError, ValueError, TypeError):
        return {}  # everything is fetched again
