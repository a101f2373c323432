"""Names in a mirror; ``docs/explanation/mirror.md`` describes the layout.

files/<path with the content's digest before the suffix>    a name never changes content
records/round=<n>/<stage>.json                              put last; a stage is mirrored when its record exists
versions/<number>.json                                      what changes outside stages; the highest number counts
lease/<number>.json                                         who writes; the highest number counts
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import PurePosixPath
from typing import Any

from d3po_core.errors import D3POError

STAGES = ("config", "sample", "judge", "label", "derive", "train", "evaluate", "guard", "publish")
FORMAT = 1
DIGITS = 16  # of a digest in a name
Content = dict[str, Any]


@dataclass(frozen=True)
class Piece:
    """A file of the campaign: its digest, its size, and the object that holds it; None if it was left out."""

    sha256: str
    bytes: int
    object: str | None


@dataclass(frozen=True)
class StageCopy:
    """A finished stage in the mirror.

    Attributes:
        round: the round.
        stage: its name.
        record: the text of ``stages/round=<n>/<stage>.json``; None for publish, which has a row instead.
        listed: the text of ``<stage>.files``, which holds every file's digest: two copies are the same stage when, and
            only when, this is the same.
        files: the stage's files by their path in the campaign, without the record.
    """

    round: int
    stage: str
    record: str | None
    listed: str
    files: dict[str, Piece]

    @property
    def place(self) -> tuple[int, int]:
        """Return the stage's place among all stages of a campaign."""
        return self.round, STAGES.index(self.stage)

    @property
    def name(self) -> str:
        """Return the name of the stage's record in the mirror."""
        return record_name(self.round, self.stage)


@dataclass(frozen=True)
class Version:
    """The files and judgements that belong to no stage, at one moment.

    Attributes:
        number: its number; the highest counts.
        campaign: the campaign's id.
        files: files by their path in the campaign.
        journal: blocks of the labelling page's entries, in order.
        notes: the journal's notes: sampling, name, value.
    """

    number: int
    campaign: str
    files: dict[str, Piece]
    journal: list[Piece] = field(default_factory=list)
    notes: list[list[str]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Return the version's name in the mirror."""
        return version_name(self.number)


def object_name(path: str, sha256: str) -> str:
    """Return the name of a file's object: its path with the start of the content's digest before the suffix."""
    inner = PurePosixPath(path)
    return f"files/{inner.with_name(f'{inner.stem}.{sha256[:DIGITS]}{inner.suffix}')}"


def record_name(round_number: int, stage: str) -> str:
    """Return the name of a stage's record."""
    return f"records/round={round_number}/{stage}.json"


def version_name(number: int) -> str:
    """Return the name of a version."""
    return f"versions/{number:08d}.json"


def lease_name(number: int) -> str:
    """Return the name of a lease."""
    return f"lease/{number:08d}.json"


def numbered(name: str) -> int | None:
    """Return the number in a name of a version or a lease, None if it has none."""
    stem = PurePosixPath(name).stem
    return int(stem) if stem.isdigit() else None


def numbers_in(names: Iterable[str]) -> list[int]:
    """Return the numbers in names of versions or leases."""
    return [number for name in names if (number := numbered(name)) is not None]


def place_of(name: str) -> tuple[int, int] | None:
    """Return round and order of the stage that a record's name tells, None if it is no record's."""
    parts = PurePosixPath(name).parts
    if len(parts) != 3 or parts[0] != "records" or not parts[1].removeprefix("round=").isdigit():
        return None
    stage = PurePosixPath(parts[2]).stem
    return (int(parts[1].removeprefix("round=")), STAGES.index(stage)) if stage in STAGES else None


def packed(content: StageCopy | Version) -> bytes:
    """Return a record's or a version's bytes."""
    return json.dumps({"format": FORMAT, **asdict(content)}, indent=1, sort_keys=True).encode()


def stage_copy(content: bytes, where: str) -> StageCopy:
    """Return a stage's record from its bytes.

    Raises:
        D3POError: it cannot be read, or names a file outside the campaign.
    """
    values = _unpacked(content, where)
    try:
        return StageCopy(values["round"], values["stage"], values["record"], values["listed"], _pieces(values, where))
    except (KeyError, TypeError) as error:
        raise D3POError(f"{where}: is no record of a stage ({error}); {REPAIR}") from None


def version(content: bytes, where: str) -> Version:
    """Return a version from its bytes.

    Raises:
        D3POError: it cannot be read, or names a file outside the campaign.
    """
    values = _unpacked(content, where)
    try:
        journal = [Piece(**piece) for piece in values["journal"]]
        return Version(values["number"], values["campaign"], _pieces(values, where), journal, values["notes"])
    except (KeyError, TypeError) as error:
        raise D3POError(f"{where}: is no version of a campaign ({error}); {REPAIR}") from None


REPAIR = "restore the object, or push the campaign to an empty prefix from a machine that has it"


def _unpacked(content: bytes, where: str) -> Content:
    try:
        values = json.loads(content)
        found = values.pop("format")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise D3POError(f"{where}: cannot be read ({error}); {REPAIR}") from None
    if found != FORMAT:
        raise D3POError(f"{where}: has format {found}; this d3po reads format {FORMAT}: install the one that wrote it")
    return dict(values)


def _pieces(values: Content, where: str) -> dict[str, Piece]:
    for path in values["files"]:
        inner = PurePosixPath(path)
        if inner.is_absolute() or ".." in inner.parts or not inner.parts or "\0" in path:
            raise D3POError(f"{where}: names {path!r}, which lies outside the campaign; nothing was written")
    return {path: Piece(**piece) for path, piece in values["files"].items()}
