"""Digests of finished stages' files: a stage writes them before its record, and readers check them.

Beside each stage's record, ``stages/round=<n>/<stage>.json``, lies ``<stage>.files``. It lists the name, size and
SHA-256 of each file that the stage added to the round, and of the record itself. Rounds of earlier versions have no
such list and are read without a check.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from d3po_core.errors import D3POError
from d3po_core.image_ids import is_imported
from d3po_core.store.at_hand import bring

# How to repair a damaged file, by the folder it lies in.
REMEDIES = {
    "images": "draw it again (d3po regenerate ID --output FILE) or restore it from a copy",
    "trajectories": "restore it from a copy, or remove the round's trajectories: a replay samples them anew",
    "checkpoints": "restore it from a copy; d3po replay shows whether the round trains to the same weights",
}
RESTORE = "restore it from a copy"
# In a folder whose missing files were left out of the mirror that this copy of the campaign came from.
LEFT_OUT = ".left-out"
_known: dict[tuple[str, int, int, int], str] = {}
_listed: dict[tuple[str, int], dict[str, dict[str, tuple[int, str]]]] = {}


@dataclass(frozen=True)
class Damage:
    """A file of a finished stage that is gone or has changed since it was written."""

    path: str
    what: str

    def __str__(self) -> str:
        """Return where the damage is, what is wrong, and what to do."""
        return f"{self.path} {self.what}; {REMEDIES.get(self.path.partition('/')[0], RESTORE)}"


def record_files(campaign: Path, round_number: int, stage: str, record: Callable[[], str] | None = None) -> str:
    """Flush a stage's files to disk, write their digests, and return the text of the stage's record.

    A file that an earlier stage of the round listed stays in that stage's list. The caller then writes the record.

    Args:
        campaign: the campaign's folder.
        round_number: the round.
        stage: the stage's name.
        record: makes the record's text, called once the files are flushed; None for a stage without a record.
    """
    listed: dict[str, tuple[int, str]] = {}
    for path in _lists(campaign, round_number):
        if path.stem != stage:
            listed |= _read_list(path)
    paths = [path for path in _files_of(campaign, round_number) if path.relative_to(campaign).as_posix() not in listed]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digests = dict(zip(paths, pool.map(_flushed, paths), strict=True))
    for folder in {path.parent for path in paths}:
        _flush(folder)
    found = {path.relative_to(campaign).as_posix(): [path.stat().st_size, digests[path]] for path in paths}
    text = record() if record else ""
    if record:
        content = text.encode()
        name = f"stages/round={round_number}/{stage}.json"
        found[name] = [len(content), hashlib.sha256(content).hexdigest()]
    if not found:
        return text
    target = campaign / "stages" / f"round={round_number}" / f"{stage}.files"
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_text(json.dumps(found, indent=0, sort_keys=True))
    _flush(temporary)
    os.replace(temporary, target)
    return text


def was_finished(campaign: Path, round_number: int, stage: str) -> bool:
    """Return whether a stage's record exists, or should: its round is finished and has the stage's list."""
    folder = campaign / "stages" / f"round={round_number}"
    row = campaign / "rounds" / f"round={round_number}" / "part.parquet"
    return (folder / f"{stage}.json").exists() or (row.exists() and (folder / f"{stage}.files").exists())


def require_record(campaign: Path, round_number: int, stage: str) -> None:
    """Check a stage's record against its digest, if both exist.

    Raises:
        D3POError: the record's content has changed; one line that names it.
    """
    name = f"stages/round={round_number}/{stage}.json"
    path = (campaign / name).with_suffix(".files")
    entry = _by_kind(path).get("stages", {}).get(name) if path.exists() else None
    if entry and (campaign / name).exists():
        _raise(campaign, [damage for damage in [_damage(campaign, name, *entry)] if damage])


def damages(campaign: Path, rounds: Iterable[int] | None = None, kinds: Iterable[str] | None = None) -> list[Damage]:
    """Return the damage to files of finished stages, in order.

    A round whose trajectories are all gone counts as pruned, not damaged.

    Args:
        campaign: the campaign's folder.
        rounds: the rounds to check; all when not given.
        kinds: first folders of the files' paths, such as ``samples``; all when not given.
    """
    entries = [(name, *entry) for name, entry in _entries(campaign, rounds, kinds)]
    found = [damage for entry in sorted(entries) if (damage := _damage(campaign, *entry))]
    return found + (_lists_gone(campaign) if kinds is None and rounds is None else [])


def count_files(campaign: Path, rounds: Iterable[int] | None = None) -> int:
    """Return how many files the stages of the given rounds listed; all rounds when not given."""
    return sum(1 for _ in _entries(campaign, rounds))


def require_whole(campaign: Path, rounds: Iterable[int] | None = None, kinds: Iterable[str] | None = None) -> None:
    """Check that files are what finished stages wrote.

    Raises:
        D3POError: some are not; one line that names the first, how many more there are, and what to do.
    """
    _raise(campaign, damages(campaign, rounds, kinds))


def require_files(campaign: Path, names: Iterable[str]) -> None:
    """Check files given by their paths in the campaign; a file that no stage listed only has to exist."""
    wanted = set(names)
    bring(campaign, wanted)
    kinds = {name.partition("/")[0] for name in wanted}
    # A round's files are only in that round's lists; reading the lists of all rounds takes seconds in a long campaign.
    listed = {name: entry for name, entry in _entries(campaign, _rounds_of(wanted), kinds) if name in wanted}
    found = [_damage(campaign, name, *listed[name]) for name in sorted(listed)]
    gone = [Damage(name, "is gone") for name in sorted(wanted - listed.keys()) if not (campaign / name).is_file()]
    _raise(campaign, [damage for damage in found if damage] + gone)


def listed_files(campaign: Path, round_number: int, stage: str) -> dict[str, tuple[int, str]]:
    """Return size and digest of each file that a stage listed, by its path in the campaign; none without a list."""
    path = campaign / "stages" / f"round={round_number}" / f"{stage}.files"
    return dict(_read_list(path)) if path.exists() else {}


def noted_names(campaign: Path, rounds: Iterable[int] | None = None, kinds: Iterable[str] | None = None) -> set[str]:
    """Return the paths in the campaign of the files that finished stages listed, of some rounds and kinds or all."""
    return {name for name, _ in _entries(campaign, rounds, kinds)}


def sha256_of(path: Path) -> str:
    """Return a file's digest, computed once per process while the file stays unchanged."""
    status = path.stat()
    key = (str(path), status.st_ino, status.st_size, status.st_mtime_ns)
    if key not in _known:
        with path.open("rb") as file:
            _known[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return _known[key]


def _raise(campaign: Path, found: list[Damage]) -> None:
    if found:
        more = f" (and {len(found) - 1} more files: d3po check --campaign {campaign.name})" if len(found) > 1 else ""
        raise D3POError(f"campaign {campaign.name!r}: {found[0]}{more}")


def _damage(campaign: Path, name: str, size: int, digest: str) -> Damage | None:
    path = campaign / name
    try:
        found = os.path.getsize(path) if os.path.isfile(path) else None
        if found is None:
            return None if _pruned(path) or _not_begun(campaign, name) else Damage(name, "is gone")
        if found != size:
            return Damage(name, f"has {found} bytes in place of {size}: it is damaged")
        return None if sha256_of(path) == digest else Damage(name, "has other content than was written: it is damaged")
    except OSError as error:
        return Damage(name, f"cannot be read ({error.strerror or error})")


def _not_begun(campaign: Path, name: str) -> bool:
    """Return whether a record is missing because its unfinished round was stopped before writing it."""
    kind, _, inner = name.partition("/")
    return kind == "stages" and not (campaign / "rounds" / inner.partition("/")[0] / "part.parquet").exists()


def _pruned(path: Path) -> bool:
    if (path.parent / LEFT_OUT).exists():
        return True
    sampled = path.parent.parent.name == "trajectories" and not is_imported(path.name)
    return sampled and all(is_imported(other.name) for other in path.parent.glob("*.safetensors"))


def _files_of(campaign: Path, round_number: int) -> Iterator[Path]:
    """Yield a round's files, except hidden ones and those in ``stages``, ``staging`` and ``comparisons``."""
    for folder in sorted(campaign.glob(f"*/round={round_number}")):
        if folder.parent.name not in ("stages", "staging", "comparisons"):
            yield from sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))


def _lists_gone(campaign: Path) -> list[Damage]:
    """Return the missing lists of rounds in which another list names a record."""
    begun = {path.parent for path in campaign.glob("stages/round=*/*.files")}
    begun = {folder for folder in begun if any(name.endswith(".json") for path in folder.glob("*.files")
                                               for name in _read_list(path))}  # fmt: skip
    owed = [record.with_suffix(".files") for folder in begun for record in folder.glob("*.json")]
    rows = {path.parent.name for path in campaign.glob("rounds/round=*/part.parquet")}
    # The last round's list may still be missing: a run writes it after the round's row.
    last = max(rows, key=lambda name: int(name.removeprefix("round=")), default="")
    owed += [folder / "publish.files" for folder in begun if folder.name in rows - {last}]
    return [Damage(p.relative_to(campaign).as_posix(), "is gone") for p in sorted(owed) if not p.exists()]


def _entries(
    campaign: Path, rounds: Iterable[int] | None = None, kinds: Iterable[str] | None = None
) -> Iterator[tuple[str, tuple[int, str]]]:
    """Yield name, size and digest of each file that stages listed, of the given rounds and kinds or of all."""
    wanted = None if kinds is None else set(kinds)
    for number in _rounds_begun(campaign) if rounds is None else sorted(set(rounds)):
        for path in _lists(campaign, number):
            for kind, listed in _by_kind(path).items():
                if wanted is None or kind in wanted:
                    yield from listed.items()


def _rounds_of(names: Iterable[str]) -> set[int]:
    """Return the rounds in whose folders these paths lie, such as 3 for ``rounds/round=3/part.parquet``."""
    folders = {part for name in names for part in name.split("/")[:-1] if part.startswith("round=")}
    return {int(number) for folder in folders if (number := folder.removeprefix("round=")).isdigit()}


def _lists(campaign: Path, round_number: int) -> list[Path]:
    # A long campaign has thousands of lists; a glob takes ten times as long.
    folder = campaign / "stages" / f"round={round_number}"
    names = os.listdir(folder) if folder.is_dir() else []
    return [folder / name for name in sorted(names) if name.endswith(".files")]


def _rounds_begun(campaign: Path) -> list[int]:
    names = [path.name.removeprefix("round=") for path in campaign.glob("stages/round=*")]
    return sorted(int(name) for name in names if name.isdigit())


def _read_list(path: Path) -> dict[str, tuple[int, str]]:
    return {name: entry for listed in _by_kind(path).values() for name, entry in listed.items()}


def _by_kind(path: Path) -> dict[str, dict[str, tuple[int, str]]]:
    """Return a list's entries by the first folder of their names, read once while the list stays unchanged."""
    key = (str(path), os.stat(path).st_mtime_ns)
    if key not in _listed:
        found: dict[str, dict[str, tuple[int, str]]] = {}
        try:
            for name, (size, digest) in _parsed(path):
                found.setdefault(str(name).partition("/")[0], {})[str(name)] = (int(size), str(digest))
        except (OSError, ValueError, TypeError) as error:
            raise D3POError(f"{path}: is damaged ({error}); {RESTORE}") from None
        _listed[key] = found
    return _listed[key]


def _parsed(path: Path) -> Iterable[tuple[str, tuple[int, str]]]:
    content = json.loads(path.read_text())
    if not isinstance(content, dict) or not content:
        raise ValueError("it lists no files")
    return content.items()


def _flushed(path: Path) -> str:
    _flush(path)
    return sha256_of(path)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
