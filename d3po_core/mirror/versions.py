"""Versions: what lies outside stages and may change, above all people's judgements; the highest number counts."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from d3po_core.errors import D3POError
from d3po_core.mirror.layout import (
    REPAIR,
    STAGES,
    Piece,
    Version,
    numbers_in,
    object_name,
    packed,
    version,
    version_name,
)
from d3po_core.mirror.lease import Lease
from d3po_core.mirror.objects import Objects
from d3po_core.mirror.state import State
from d3po_core.people.guideline import images_in
from d3po_core.people.journal import raw_rows
from d3po_core.store.campaign import CAMPAIGN_FILE, campaign_id, rules_of
from d3po_core.store.integrity import listed_files, sha256_of

OUTSIDE = (
    "campaign.json", "target.json", "frozen.json", "invitations.json", "stages/round=*/waiting.json",
    "comparisons/*.json", "comparisons/round=*/*.parquet", "image_reports/round=*/*.parquet",
    "judgements/round=*/*.parquet",
)  # fmt: skip
JOURNAL_BLOCK = 1000  # entries per object; a full block never changes
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


def put_version(
    campaign: Path, mirrored: Iterable[tuple[int, int]], objects: Objects, lease: Lease, state: State
) -> bool:
    """Put a new version if something outside stages has changed; return whether it did.

    Args:
        campaign: the campaign's folder.
        mirrored: stages whose records are in the mirror; their files need no other copy.
        objects: the campaign's objects.
        lease: the right to write.
        state: what was the same last; it is brought up to date.
    """
    before = newest_version(objects)
    require_same_campaign(campaign, before, objects)
    kept = {name for number, order in mirrored for name in listed_files(campaign, number, STAGES[order])}
    paths = {path.relative_to(campaign).as_posix(): path for path in _outside(campaign)}
    paths = {name: path for name, path in paths.items() if name not in kept}
    # Stages may leave images out, and raters need those of the guideline.
    paths |= {path.relative_to(campaign).as_posix(): path for path in _guideline_images(campaign)}
    files = {name: _piece(name, path) for name, path in paths.items()}
    blocks, notes = _journal(campaign)
    new = Version(before.number + 1 if before else 1, campaign_id(campaign), files, [p for p, _ in blocks], notes)
    if not before or replace(new, number=before.number) != before:
        known = {piece.object for piece in [*before.files.values(), *before.journal]} if before else set()
        for name, piece in files.items():
            if piece.object and piece.object not in known:
                objects.create_file(piece.object, paths[name])
        for piece, content in blocks:
            if piece.object and piece.object not in known:
                objects.create(piece.object, content)
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


def _outside(campaign: Path) -> Iterator[Path]:
    for pattern in OUTSIDE:
        yield from (path for path in sorted(campaign.glob(pattern)) if not path.name.startswith("."))


def _guideline_images(campaign: Path) -> list[Path]:
    if not (campaign / CAMPAIGN_FILE).exists():
        return []
    return images_in(rules_of(campaign).judge.people.guideline, campaign)


def _piece(name: str, path: Path) -> Piece:
    digest = sha256_of(path)
    return Piece(digest, path.stat().st_size, object_name(name, digest))


def _journal(campaign: Path) -> tuple[list[tuple[Piece, bytes]], list[list[str]]]:
    """Return the journal's blocks with their content, and its notes."""
    rows, notes = raw_rows(campaign)
    blocks = []
    for first in range(0, len(rows), JOURNAL_BLOCK):
        content = "".join(f"{json.dumps(row)}\n" for row in rows[first : first + JOURNAL_BLOCK]).encode()
        digest = hashlib.sha256(content).hexdigest()
        blocks.append((Piece(digest, len(content), object_name(f"journal/{first:08d}.jsonl", digest)), content))
    return blocks, notes
