"""Versions: what lies outside stages and may change, above all people's judgements; the highest number counts."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from d3po_core.errors import D3POError
from d3po_core.mirror.layout import REPAIR, Piece, Version, numbers_in, object_name, packed, version, version_name
from d3po_core.mirror.lease import Lease
from d3po_core.mirror.objects import Objects
from d3po_core.mirror.outside import journal_blocks, outside_paths
from d3po_core.mirror.state import State
from d3po_core.store.campaign import campaign_id
from d3po_core.store.integrity import sha256_of

KEPT = 5


def newest_version(objects: Objects) -> Version | None:
    """Return the newest version, None if the mirror has none."""
    for _ in range(5):
        numbers = numbers_in(entry.name for entry in objects.listed("versions/"))
        if not numbers:
            return None
        name = version_name(max(numbers))
        if (content := objects.get(name)) is not None:  # else a newer one came, and this one was deleted
            return version(content, f"{objects.shown}/{name}")
    raise D3POError(f"{objects.shown}: versions are written faster than they can be read; try again")


def put_version(campaign: Path, before: Version | None, objects: Objects, lease: Lease, state: State) -> bool:
    """Put a new version if something outside stages has changed; return whether it did.

    Args:
        campaign: the campaign's folder.
        before: the newest version in the mirror, None if there is none.
        objects: the campaign's objects.
        lease: the right to write.
        state: the stages that the mirror has, whose files need no other copy; what was the same last is brought up to
            date.
    """
    paths = outside_paths(campaign, state)
    files = {name: _piece(name, path) for name, path in paths.items()}
    there = {piece.object for piece in [*before.files.values(), *before.journal]} if before else set()
    journal, contents, notes = journal_blocks(campaign, there)
    new = Version(before.number + 1 if before else 1, campaign_id(campaign), files, journal, notes)
    if not before or replace(new, number=before.number) != before:
        for name, piece in files.items():
            if piece.object and piece.object not in there:
                objects.create_file(piece.object, paths[name])
        for name, content in contents.items():
            if name not in there:
                objects.create(name, content)
        new = _create(new, objects, lease)
        _delete_old(new.number, objects)
    else:
        new = before
    state.version, state.files = new.number, {name: piece.sha256 for name, piece in new.files.items()}
    return new is not before


def journal_entries(found: Version, objects: Objects) -> list[list[Any]]:
    """Return the journal's entries of a version.

    Raises:
        D3POError: a block is gone or damaged.
    """
    rows: list[list[Any]] = []
    for piece in found.journal:
        content = objects.get(piece.object or "")
        if content is None or hashlib.sha256(content).hexdigest() != piece.sha256:
            raise D3POError(f"{objects.shown}/{piece.object}: is gone or damaged; judgements are in it. {REPAIR}")
        rows += [json.loads(line) for line in content.splitlines()]
    return rows


def require_same_campaign(campaign: Path, found: Version | None, objects: Objects) -> None:
    """Check that the folder and the mirror hold the same campaign, not two of one name.

    Raises:
        D3POError: they hold two.
    """
    if found and (campaign / "campaign.json").exists() and found.campaign != campaign_id(campaign):
        raise D3POError(
            f"{objects.shown} holds another campaign of the name {campaign.name!r} than {campaign}; nothing was "
            "changed. Choose another --campaign or another store.mirror"
        )


def _create(new: Version, objects: Objects, lease: Lease) -> Version:
    for number in range(new.number, new.number + 20):
        lease.require()
        new = replace(new, number=number)
        if objects.create(new.name, packed(new)):
            return new
    raise D3POError(f"{objects.shown}: somebody else writes versions of this campaign; end that process")


def _delete_old(newest: int, objects: Objects) -> None:
    for number in numbers_in(entry.name for entry in objects.listed("versions/")):
        if number <= newest - KEPT:
            objects.delete(version_name(number))


def _piece(name: str, path: Path) -> Piece:
    digest = sha256_of(path)
    return Piece(digest, path.stat().st_size, object_name(name, digest))
