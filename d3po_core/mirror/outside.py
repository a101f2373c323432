"""Find the files that belong to no stage: settings, goals, comparisons, and judgements that no stage has listed yet.

Rounds that the mirror has as a whole are looked at again only when somebody adds a file to one: people may judge, and
report images of, a finished round. Blocks of the journal are read once.
"""

import hashlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from d3po_core.mirror.known import rounds_begun
from d3po_core.mirror.layout import STAGES, Piece, object_name
from d3po_core.mirror.state import State
from d3po_core.people.guideline import images_in
from d3po_core.people.journal import raw_rows
from d3po_core.store.campaign import CAMPAIGN_FILE, rules_of
from d3po_core.store.integrity import listed_files

SETTINGS = (CAMPAIGN_FILE, "target.json", "frozen.json", "invitations.json")
PEOPLES = ("comparisons", "image_reports", "judgements")
# Patterns of all these files.
_TABLES = tuple(f"{table}/round=*/*.parquet" for table in PEOPLES)
OUTSIDE = (*SETTINGS, "stages/round=*/waiting.json", "comparisons/*.json", *_TABLES)
JOURNAL_BLOCK = 1000  # entries per object; a full block never changes
# A folder that changed later than this may change again within one tick of the disk's clock.
SETTLED_SECONDS = 2.0
Row = list[Any]

# Folder of a whole round -> the time of its last change, and its files that no stage lists.
_unlisted_then: dict[Path, tuple[int, list[str]]] = {}
# Campaign -> the full blocks of its journal, and the last entry in them.
_full_blocks: dict[Path, tuple[list[Piece], Row]] = {}


def outside_paths(campaign: Path, state: State) -> dict[str, Path]:
    """Return the files outside stages by their path in the campaign; those of stages that the mirror has are left out.

    Args:
        campaign: the campaign's folder.
        state: which stages the mirror has.
    """
    names = [name for name in SETTINGS if (campaign / name).exists()]
    waiting = [f"stages/round={number}/waiting.json" for number in rounds_begun(campaign, state.whole)]
    names += [name for name in waiting if (campaign / name).exists()]
    names += [f"comparisons/{name}" for name in _visible(campaign / "comparisons", ".json")]
    for table in PEOPLES:
        for folder in _round_folders(campaign / table):
            names += _unlisted(campaign, folder, state)
    # Stages may leave images out, and raters need those of the guideline.
    images = images_in(rules_of(campaign).judge.people.guideline, campaign) if CAMPAIGN_FILE in names else []
    names += [path.relative_to(campaign).as_posix() for path in images]
    return {name: campaign / name for name in names}


def journal_blocks(campaign: Path, there: set[str | None]) -> tuple[list[Piece], dict[str, bytes], list[list[str]]]:
    """Return the journal's blocks, the content of those that are not known to be in the mirror, and its notes.

    Args:
        campaign: the campaign's folder.
        there: names of objects that the mirror has.
    """
    full, last = _full_blocks.get(campaign, ([], []))
    if any(piece.object not in there for piece in full):
        full, last = [], []
    rows, notes = raw_rows(campaign, last[0] if last else 0)
    if last and (not rows or rows.pop(0) != last):  # another journal lies there now
        (full, last), (rows, notes) = ([], []), raw_rows(campaign)
    pieces, contents = [*full], {}
    for first in range(0, len(rows), JOURNAL_BLOCK):
        block = rows[first : first + JOURNAL_BLOCK]
        content = "".join(f"{json.dumps(row)}\n" for row in block).encode()
        digest = hashlib.sha256(content).hexdigest()
        name = object_name(f"journal/{len(pieces) * JOURNAL_BLOCK:08d}.jsonl", digest)
        pieces.append(Piece(digest, len(content), name))
        contents[name] = content
        if len(block) == JOURNAL_BLOCK:
            full, last = [*pieces], block[-1]
    _full_blocks[campaign] = (full, last)
    return pieces, contents, notes


def _unlisted(campaign: Path, folder: Path, state: State) -> list[str]:
    """Return a folder's tables that no stage lists which the mirror has."""
    changed, number = folder.stat().st_mtime_ns, int(folder.name.removeprefix("round="))
    whole = number <= state.whole
    if whole and (then := _unlisted_then.get(folder)) and then[0] == changed:
        return then[1]
    listed = {
        name
        for order, stage in enumerate(STAGES)
        if state.knows((number, order))
        for name in listed_files(campaign, number, stage)
    }
    names = [f"{folder.parent.name}/{folder.name}/{name}" for name in _visible(folder, ".parquet")]
    names = [name for name in names if name not in listed]
    if whole and time.time_ns() - changed > SETTLED_SECONDS * 1e9:
        _unlisted_then[folder] = (changed, names)
    return names


def _round_folders(table: Path) -> Iterator[Path]:
    # A long campaign has a thousand of them; a glob takes ten times as long.
    names = os.listdir(table) if table.is_dir() else []
    yield from (table / name for name in sorted(names) if name.removeprefix("round=").isdigit())


def _visible(folder: Path, suffix: str) -> list[str]:
    names = os.listdir(folder) if folder.is_dir() else []
    return [name for name in sorted(names) if name.endswith(suffix) and not name.startswith(".")]
