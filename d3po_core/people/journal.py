"""The journal of a campaign's labelling page: it stores each answer on disk before the page confirms it.

It is one SQLite file in the campaign's folder, ``labels.sqlite``, and it only grows: taking a judgement back adds an
entry, and triggers refuse to change or delete one. Each entry names the sampling of its images. So if a round is
dropped and sampled again, it never gets the judgements of the old images.

    submission   the page's id for what it sends; sent twice, it is one entry
    attempt      how many entries the rater's question had before. Two windows that show the same question send the
                 same attempt, and the second is told that the first was kept. We refuse an attempt that was never
                 offered: stored, it would later block the true one

An open journal that is renamed or replaced accepts nothing more: the open file would grow where nobody looks.
"""

import contextlib
import hashlib
import json
import os
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from d3po_core.errors import D3POError
from d3po_core.store.at_hand import bring_tables
from d3po_core.store.files import disk_errors
from d3po_core.store.stages import stage_path
from d3po_core.store.tables import partition, table_from_rows, write_table
from d3po_core.ways import WAYS

JOURNAL_FILE = "labels.sqlite"
SOURCE = "page"
# The answer to a pair of which neither image is good.
BOTH_BAD = (-1.0, -1.0)
# Prefix of files that this module writes; all other files of judgements come from elsewhere.
FILE_PREFIX = "page-"

_TABLES = """
CREATE TABLE IF NOT EXISTS entries (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    submission TEXT NOT NULL UNIQUE,
    sampling TEXT NOT NULL,
    rater TEXT NOT NULL,
    question_id TEXT NOT NULL,
    attempt INTEGER NOT NULL,
    action TEXT NOT NULL CHECK (action IN ('answer', 'skip', 'undo')),
    mode TEXT NOT NULL,
    shown TEXT NOT NULL,
    answer TEXT,
    seconds REAL,
    judged_at INTEGER NOT NULL,
    undoes INTEGER UNIQUE REFERENCES entries (seq),
    UNIQUE (sampling, rater, question_id, attempt)
);
CREATE INDEX IF NOT EXISTS entries_of_a_sampling ON entries (sampling, seq);
CREATE TRIGGER IF NOT EXISTS no_entry_is_changed BEFORE UPDATE ON entries BEGIN SELECT RAISE(ABORT, 'append only'); END;
CREATE TRIGGER IF NOT EXISTS no_entry_is_deleted BEFORE DELETE ON entries BEGIN SELECT RAISE(ABORT, 'append only'); END;
CREATE TABLE IF NOT EXISTS notes (sampling TEXT NOT NULL, name TEXT NOT NULL, value TEXT NOT NULL,
                                  PRIMARY KEY (sampling, name));
"""
_COLUMNS = (
    "seq, submission, sampling, rater, question_id, attempt, action, mode, shown, answer, seconds, judged_at, undoes"
)


@dataclass(frozen=True)
class Submission:
    """A rater's action on a question.

    Attributes:
        submission: unique name that the page made.
        sampling: of the images; see ``sampling_of``, or the id of a blind comparison.
        rater: who.
        question_id: which question.
        attempt: number of the rater's earlier entries on that question.
        action: ``answer``, ``skip`` or ``undo``.
        mode: pair, mark_bad, best or rank.
        shown: sample ids in the order on the page.
        answer: one number per image of ``shown``; pair: (1, -1), (-1, 1), (0, 0) for a tie or (-1, -1) for both bad;
            mark_bad: 0 bad, 1 good; best and rank: 1 is best. None unless the action is ``answer``.
        seconds: how long it took, None if unknown.
        undoes: ``seq`` of the entry that an undo takes back.
    """

    submission: str
    sampling: str
    rater: str
    question_id: str
    attempt: int
    action: str
    mode: str
    shown: tuple[str, ...]
    answer: tuple[float, ...] | None
    seconds: float | None
    undoes: int | None = None


@dataclass(frozen=True)
class Entry(Submission):
    """A stored submission with its journal number and time (naive UTC, growing with the number)."""

    seq: int = 0
    judged_at: datetime = datetime.min


class ConflictError(D3POError):
    """A submission contradicts the journal; it was not stored, and sending it again does not help."""


def sampling_of(campaign: Path, round_number: int) -> str | None:
    """Id of a round's sampling, new if the round is sampled again; None if it is not sampled."""
    path = stage_path(campaign, round_number, "sample")
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except FileNotFoundError:
        return None


class Journal:
    """A campaign's journal; threads may share one object, processes one file.

    Args:
        campaign: the campaign's folder.
        read_only: write nothing, so the folder may be read-only; the file must exist.

    Raises:
        D3POError: the file cannot be opened.
    """

    def __init__(self, campaign: Path, read_only: bool = False) -> None:
        self.path, self._read_only = campaign / JOURNAL_FILE, read_only
        self._lock = threading.Lock()
        with self._errors(), disk_errors(self.path):
            if read_only:
                self._connection = _connected_to_read(self.path)
                self._file = os.stat(self.path)
                return
            _require_journal(self.path)
            # Autocommit: we begin and end transactions by hand, so the code shows where it waits for the disk.
            self._connection = sqlite3.connect(self.path, timeout=10, isolation_level=None, check_same_thread=False)
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = FULL")
            self._connection.executescript(_TABLES)
            self._file = os.stat(self.path)

    @property
    def in_place(self) -> bool:
        """Return whether the path still leads to the file that was opened."""
        try:
            return os.path.samestat(self._file, os.stat(self.path))
        except OSError:
            return False

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._connection.close()

    def append(self, said: Submission) -> tuple[Entry, bool]:
        """Store a submission; return once it is on disk.

        Returns:
            The entry, and whether it is new. It is old if this submission was stored before, or if the rater has
            answered the question since the page asked; then the entry is the stored one.

        Raises:
            ConflictError: another submission has this name, or the attempt was never offered.
            D3POError: it could not be written; nothing was stored.
        """
        with self._transaction() as connection:
            same = self._rows("WHERE submission = ?", (said.submission,))
            if same and not _same(same[0], said):
                raise ConflictError("another judgement was kept under this name with other content; reload the page")
            key = (said.sampling, said.rater, said.question_id)
            before = self._rows("WHERE sampling = ? AND rater = ? AND question_id = ? ORDER BY seq", key)
            attempt = next_attempt(before)
            if not same and said.attempt > attempt:
                raise ConflictError("this question was never asked so often; reload the page")
            kept = same or (before[-1:] if said.attempt < attempt else [])
            if said.undoes is not None:
                kept = kept or self._rows("WHERE undoes = ?", (said.undoes,))
            if kept:
                return kept[0], False
            latest = connection.execute("SELECT judged_at FROM entries ORDER BY seq DESC LIMIT 1").fetchone()
            # Times must grow even if the clock is set back, because the last word counts by time.
            judged_at = max(time.time_ns() // 1000, latest[0] + 1 if latest else 0)
            cursor = connection.execute(
                f"INSERT INTO entries ({_COLUMNS}) VALUES (NULL, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    said.submission, *key, said.attempt, said.action, said.mode, json.dumps(said.shown),
                    None if said.answer is None else json.dumps(said.answer), said.seconds, judged_at, said.undoes,
                ),
            )  # fmt: skip
            assert cursor.lastrowid is not None
            fields = {name: getattr(said, name) for name in Submission.__dataclass_fields__}
            return Entry(**fields, seq=cursor.lastrowid, judged_at=_time(judged_at)), True

    def entries(self, sampling: str, after: int = 0) -> list[Entry]:
        """Entries of a sampling with numbers above ``after``, in order."""
        with self._lock, self._errors():
            self._check_place()
            return self._rows("WHERE sampling = ? AND seq > ? ORDER BY seq", (sampling, after))

    def note(self, sampling: str, name: str, value: str) -> bool:
        """Store a note on a sampling; return whether it is new or changed."""
        with self._transaction() as connection:
            return bool(
                connection.execute(
                    "INSERT INTO notes VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET value = excluded.value "
                    "WHERE value != excluded.value", (sampling, name, value)
                ).rowcount
            )  # fmt: skip

    def read_note(self, sampling: str, name: str) -> str | None:
        """The note of that name, None if there is none."""
        with self._lock, self._errors():
            query = "SELECT value FROM notes WHERE sampling = ? AND name = ?"
            row = self._connection.execute(query, (sampling, name)).fetchone()
        return row[0] if row else None

    def raw(self, first: int = 0) -> tuple[list[list[Any]], list[list[str]]]:
        """Entries from a number on, and all notes, as SQLite holds them at one moment."""
        with self._lock, self._errors():
            self._connection.execute("BEGIN")
            try:
                query = f"SELECT {_COLUMNS} FROM entries WHERE seq >= ? ORDER BY seq"
                entries = self._connection.execute(query, (first,)).fetchall()
                notes = self._connection.execute("SELECT * FROM notes ORDER BY sampling, name").fetchall()
            finally:
                self._connection.execute("ROLLBACK")
        return [list(row) for row in entries], [list(row) for row in notes]

    def restore(self, rows: list[list[Any]], notes: list[list[str]]) -> int:
        """See ``restore_rows``."""
        with self._transaction() as connection:
            query = f"SELECT {_COLUMNS} FROM entries ORDER BY seq"
            here = [list(row) for row in connection.execute(query).fetchall()]
            common = min(len(here), len(rows))
            if here[:common] != rows[:common]:
                raise D3POError(
                    f"{self.path}: people judged here and elsewhere since the two copies parted; nothing was changed. "
                    "Move this campaign's folder away, then pull it again, and import what is missing"
                )
            places = ", ".join("?" * len(_COLUMNS.split(",")))
            connection.executemany(f"INSERT INTO entries ({_COLUMNS}) VALUES ({places})", rows[common:])
            connection.executemany("INSERT OR IGNORE INTO notes VALUES (?, ?, ?)", notes)
            return len(rows) - common

    @contextlib.contextmanager
    def exclusively(self) -> Iterator[None]:
        """Keep all other writers of the journal out, in this process and in others."""
        with self._transaction():
            yield

    def entries_while_exclusive(self, sampling: str, after: int) -> list[Entry]:
        """``entries``, for the holder of ``exclusively``."""
        return self._rows("WHERE sampling = ? AND seq > ? ORDER BY seq", (sampling, after))

    def _rows(self, where: str, values: Sequence[Any]) -> list[Entry]:
        rows = self._connection.execute(f"SELECT {_COLUMNS} FROM entries {where}", values).fetchall()
        return [_entry(row) for row in rows]

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._errors():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                self._check_place()
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def _check_place(self) -> None:
        if not self.in_place:
            raise D3POError(
                f"{self.path} was moved, removed or replaced while it was in use; nothing was kept. Put it back, or "
                "start the page again to use what is there now"
            )

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            if self._read_only:
                raise D3POError(f"{self.path}: {error}; restore the file, judgements are in it") from None
            raise D3POError(
                f"{self.path}: {error}; nothing was kept. Free some space, make the folder writable, or restore "
                "the file; the page sends it again"
            ) from None


def read_entries(campaign: Path, sampling: str) -> list[Entry]:
    """All entries of a sampling; without a journal none, and no file is created."""
    if not (campaign / JOURNAL_FILE).exists():
        return []
    with contextlib.closing(Journal(campaign, read_only=True)) as journal:
        return journal.entries(sampling)


def raw_rows(campaign: Path, first: int = 0) -> tuple[list[list[Any]], list[list[str]]]:
    """Entries from a number on, and notes, as SQLite holds them, for a copy elsewhere; none without a journal."""
    if not (campaign / JOURNAL_FILE).exists():
        return [], []
    with contextlib.closing(Journal(campaign, read_only=True)) as journal:
        return journal.raw(first)


def restore_rows(campaign: Path, rows: list[list[Any]], notes: list[list[str]]) -> int:
    """Add what a copy of the journal has more than this one; return the number of entries added.

    Raises:
        D3POError: the two hold different entries under one number; nothing was changed.
    """
    if not rows and not notes:
        return 0
    with contextlib.closing(Journal(campaign)) as journal:
        return journal.restore(rows, notes)


def next_attempt(entries: Iterable[Entry]) -> int:
    """The attempt of a rater's next entry on a question, given the earlier ones.

    It is their number, or more if an older journal holds an attempt that was never offered.
    """
    return max((entry.attempt + 1 for entry in entries), default=0)


def active(entries: Iterable[Entry]) -> list[Entry]:
    """Answers and skips that were not taken back, in order."""
    known = list(entries)
    undone = {entry.undoes for entry in known}
    return [entry for entry in known if entry.action != "undo" and entry.seq not in undone]


def judgement_rows(entry: Entry) -> list[dict[str, Any]]:
    """An entry as rows of the ``judgements`` schema; skips and undos give rows without a value."""
    values = entry.answer if entry.action == "answer" else None
    values, both_bad = without_both_bad(values)
    first, *others = sorted(entry.shown)
    pair = WAYS[entry.mode].kind == "choice"
    rows = []
    for position, sample_id in enumerate(entry.shown):
        if pair and sample_id != first:
            continue  # one row per pair, in an order that does not depend on the page
        rows.append(
            {
                "rater": entry.rater, "rater_kind": "human", "kind": WAYS[entry.mode].kind, "sample_id": sample_id,
                "other_id": others[0] if pair else None, "value": None if values is None else float(values[position]),
                "both_bad": both_bad if pair else None,
                "judged_at": entry.judged_at, "source": SOURCE,
                "seconds": None if values is None else entry.seconds, "position": position,
            }
        )  # fmt: skip
    return rows


def without_both_bad(answer: tuple[float, ...] | None) -> tuple[tuple[float, ...] | None, bool | None]:
    """Return a pair's answer with a tie in place of "both bad", and whether it was that; None without an answer."""
    if answer != BOTH_BAD:
        return answer, None if answer is None else False
    return (0.0, 0.0), True


def export_judgements(campaign: Path, round_number: int) -> list[Path]:
    """Write a round's new journal entries into ``judgements``; see ``export_entries``."""
    sampling = sampling_of(campaign, round_number)
    return export_entries(campaign, sampling, "judgements", round_number, judgement_rows) if sampling else []


def export_entries(
    campaign: Path, sampling: str, table: str, round_number: int, rows_of: Callable[[Entry], list[dict[str, Any]]]
) -> list[Path]:
    """Write a sampling's new journal entries into a table.

    A file's name holds the sampling and the entries' numbers, so one name always has the same content, and the files on
    disk tell what was exported. Several processes may call this at any time.

    Args:
        campaign: the campaign's folder.
        sampling: whose entries.
        table: the table.
        round_number: the round.
        rows_of: makes an entry's rows.

    Returns:
        The files written by this call; none if there is nothing new.

    Raises:
        D3POError: the journal cannot be read, or the disk is full or read-only.
    """
    if not (campaign / JOURNAL_FILE).exists():
        return []
    with contextlib.closing(Journal(campaign)) as journal, journal.exclusively():
        exported = _exported(campaign, sampling, table, round_number)
        entries = journal.entries_while_exclusive(sampling, exported)
        if not entries:
            return []
        rows = table_from_rows(table, [row for entry in entries for row in rows_of(entry)])
        file = f"{FILE_PREFIX}{sampling}-{entries[0].seq}-{entries[-1].seq}"
        return [write_table(campaign, table, round_number, rows, name=file)]


def unexported_judgements(campaign: Path) -> list[dict[str, Any]]:
    """The journal's rows of ``judgements`` that no file holds yet, with their rounds; changes nothing.

    Raises:
        D3POError: the journal cannot be read.
    """
    return [
        row | {"round": number}
        for number, entries in unexported_entries(campaign).items()
        for entry in entries
        for row in judgement_rows(entry)
    ]


def unexported_entries(campaign: Path) -> dict[int, list[Entry]]:
    """The journal's entries that no file holds yet, by round and in order; changes nothing.

    Raises:
        D3POError: the journal cannot be read.
    """
    found = {}
    for path in sorted(campaign.glob("stages/round=*/sample.json")):
        number = int(path.parent.name.removeprefix("round="))
        sampling = sampling_of(campaign, number)
        if sampling is not None:
            exported = _exported(campaign, sampling, "judgements", number)
            found[number] = [entry for entry in read_entries(campaign, sampling) if entry.seq > exported]
    return found


def _exported(campaign: Path, sampling: str, table: str, round_number: int) -> int:
    """Number of a sampling's last entry in the table's files; 0 if there is none."""
    bring_tables(campaign, [table], [round_number])
    name = re.compile(rf"{FILE_PREFIX}{sampling}-(\d+)-(\d+)\.parquet")
    found = map(name.fullmatch, (path.name for path in partition(campaign, table, round_number).glob("*")))
    return max((int(match[2]) for match in found if match), default=0)


def _require_journal(path: Path) -> None:
    """Refuse to start a new journal if tables hold entries of a lost one.

    A new journal would number its entries from 1 again, and those whose numbers the files already have would never be
    exported.
    """
    if path.exists():
        return
    for table in ("judgements", "comparisons"):
        for file in sorted(path.parent.glob(f"{table}/round=*/{FILE_PREFIX}*.parquet")):
            raise D3POError(
                f"{path}: is gone, although {file.relative_to(path.parent)} was written from it; nothing was kept. Put "
                "it back, or restore it from a copy"
            )


def _connected_to_read(path: Path) -> sqlite3.Connection:
    """Connect read-only, even if SQLite cannot write beside the file in a read-only folder."""
    uri = path.absolute().as_uri()
    try:
        connection, made = _opened(f"{uri}?mode=ro")
    except sqlite3.OperationalError:
        if os.access(path.parent, os.W_OK):
            raise
        connection, made = _opened(f"{uri}?immutable=1")
    if made:
        return connection
    connection.close()  # a page ended while it created the file
    connection, _ = _opened("file::memory:")
    connection.executescript(_TABLES)
    return connection


def _opened(uri: str) -> tuple[sqlite3.Connection, bool]:
    """A connection, and whether it has entries to read."""
    connection = sqlite3.connect(uri, uri=True, timeout=10, isolation_level=None, check_same_thread=False)
    try:
        found = connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'entries'").fetchone()
    except sqlite3.Error:
        connection.close()
        raise
    return connection, found is not None


def _same(entry: Entry, said: Submission) -> bool:
    return all(getattr(entry, name) == getattr(said, name) for name in Submission.__dataclass_fields__)


def _entry(row: Sequence[Any]) -> Entry:
    values = dict(zip(_COLUMNS.split(", "), row, strict=True))
    values["shown"] = tuple(json.loads(values["shown"]))
    values["answer"] = None if values["answer"] is None else tuple(json.loads(values["answer"]))
    values["judged_at"] = _time(values["judged_at"])
    return Entry(**values)


def _time(microseconds: int) -> datetime:
    seconds, rest = divmod(microseconds, 1_000_000)
    return datetime.fromtimestamp(seconds, UTC).replace(tzinfo=None, microsecond=rest)
