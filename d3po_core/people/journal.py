"""The journal of a campaign's labelling page: what people said, on disk before anybody is told that it is.

One SQLite file in the campaign's folder, ``labels.sqlite``. It only ever grows: taking a judgement back is an entry of
its own, and triggers refuse to change or delete one. Each entry names the sampling whose images were judged, so that a
round that was dropped and sampled again never gets the judgements of images that are gone.

    submission   made by the page before it sends; the same one sent twice is one entry
    attempt      how many entries the rater's question had before; two windows that show the same question
                 therefore send the same attempt, and the second is told that the first was kept. One that was never
                 offered is refused: kept, it would one day be in the way of the true one

A journal that is renamed or replaced while it is open takes nothing more: what it held open would go on growing where
nobody looks for it.
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
from d3po_core.store.files import disk_errors
from d3po_core.store.stages import stage_path
from d3po_core.store.tables import partition, table_from_rows, write_table
from d3po_core.ways import WAYS

JOURNAL_FILE = "labels.sqlite"
SOURCE = "page"
# Names of the files that this module writes; every other file of judgements was brought in by somebody else.
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
    """What a rater did with a question.

    Attributes:
        submission: unique name that the page made.
        sampling: whose images; see ``sampling_of``, or the id of a blind comparison.
        rater: who.
        question_id: which question.
        attempt: number of the rater's earlier entries on that question.
        action: ``answer``, ``skip`` or ``undo``.
        mode: pair, mark_bad, best or rank.
        shown: sample ids in the order in which they stood on the page.
        answer: one number an image of ``shown``; pair: (1, -1), (-1, 1) or (0, 0); mark_bad: 0 bad, 1 good; best and
            rank: 1 is best. None unless the action is ``answer``.
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
    """A submission that is on disk, its number in the journal and its time (naive UTC, growing with the number)."""

    seq: int = 0
    judged_at: datetime = datetime.min


class ConflictError(D3POError):
    """A submission that contradicts what is on record; it was not kept, and sending it again does not help."""


def sampling_of(campaign: Path, round_number: int) -> str | None:
    """Name of what was sampled in a round, another one when the round is sampled again; None if nothing is."""
    path = stage_path(campaign, round_number, "sample")
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except FileNotFoundError:
        return None


class Journal:
    """A campaign's journal; one object may be used by many threads, one file by many processes.

    Args:
        campaign: the campaign's folder.
        read_only: whether nothing is written, so that the folder need not be writable; the file must be there.

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
            # Autocommit: transactions are begun and ended by hand, so that it is plain where the disk is waited for.
            self._connection = sqlite3.connect(self.path, timeout=10, isolation_level=None, check_same_thread=False)
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = FULL")
            self._connection.executescript(_TABLES)
            self._file = os.stat(self.path)

    @property
    def in_place(self) -> bool:
        """Whether the file that was opened is still the one at its place."""
        try:
            return os.path.samestat(self._file, os.stat(self.path))
        except OSError:
            return False

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._connection.close()

    def append(self, said: Submission) -> tuple[Entry, bool]:
        """Put a submission on disk, and return only then.

        Returns:
            The entry, and whether it is new. It is not when this submission was kept before, or when the rater said
            something on this question since the page asked; then the entry is what was kept instead.

        Raises:
            ConflictError: something else was kept under this submission's name, or the attempt was never offered.
            D3POError: it could not be written; nothing was kept.
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
            # A later entry has a later time even when the clock is set back: the last word counts by time.
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
        """Keep a note on a sampling; returns whether it is new or changed."""
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

    @contextlib.contextmanager
    def exclusively(self) -> Iterator[None]:
        """Keep every other writer of the journal out, in this process and in others."""
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
    """All entries of a sampling; none, and no file made, when the campaign has no journal."""
    if not (campaign / JOURNAL_FILE).exists():
        return []
    with contextlib.closing(Journal(campaign, read_only=True)) as journal:
        return journal.entries(sampling)


def next_attempt(entries: Iterable[Entry]) -> int:
    """The attempt of a rater's next entry on a question, from the earlier ones.

    Their number; more only where an older journal holds an attempt that was made up.
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
    first, *others = sorted(entry.shown)
    pair = WAYS[entry.mode].kind == "choice"
    rows = []
    for position, sample_id in enumerate(entry.shown):
        if pair and sample_id != first:
            continue  # one row a pair, the same way round whatever the order on the page
        rows.append(
            {
                "rater": entry.rater, "rater_kind": "human", "kind": WAYS[entry.mode].kind, "sample_id": sample_id,
                "other_id": others[0] if pair else None, "value": None if values is None else float(values[position]),
                "judged_at": entry.judged_at, "source": SOURCE,
                "seconds": None if values is None else entry.seconds, "position": position,
            }
        )  # fmt: skip
    return rows


def export_judgements(campaign: Path, round_number: int) -> list[Path]:
    """Write what the journal holds of a round and no file does yet into its ``judgements``; see ``export_entries``."""
    sampling = sampling_of(campaign, round_number)
    return export_entries(campaign, sampling, "judgements", round_number, judgement_rows) if sampling else []


def export_entries(
    campaign: Path, sampling: str, table: str, round_number: int, rows_of: Callable[[Entry], list[dict[str, Any]]]
) -> list[Path]:
    """Write what the journal holds of a sampling and no file does yet into a table.

    A file is named by the sampling and the entries it holds, so that a name always has the same content; what is
    on disk says what was exported. May be called at any time, by several processes at once.

    Args:
        campaign: the campaign's folder.
        sampling: whose entries.
        table: the table.
        round_number: the round.
        rows_of: makes an entry's rows.

    Returns:
        The files that were written now; none when there is nothing new.

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
    """Rows of ``judgements``, each with its round, that the journal holds and no file does yet; changes nothing.

    Raises:
        D3POError: the journal cannot be read.
    """
    rows = []
    for path in campaign.glob("stages/round=*/sample.json"):
        number = int(path.parent.name.removeprefix("round="))
        sampling = sampling_of(campaign, number)
        if sampling is not None:
            exported = _exported(campaign, sampling, "judgements", number)
            entries = [entry for entry in read_entries(campaign, sampling) if entry.seq > exported]
            rows += [row | {"round": number} for entry in entries for row in judgement_rows(entry)]
    return rows


def _exported(campaign: Path, sampling: str, table: str, round_number: int) -> int:
    """Number of the last entry of a sampling that a file of the table holds; 0 when none does."""
    name = re.compile(rf"{FILE_PREFIX}{sampling}-(\d+)-(\d+)\.parquet")
    found = map(name.fullmatch, (path.name for path in partition(campaign, table, round_number).glob("*")))
    return max((int(match[2]) for match in found if match), default=0)


def _require_journal(path: Path) -> None:
    """Make sure that a journal whose entries are in the tables is still there.

    A new one would number its entries from 1 again, and those that files hold by number would never be written.
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
    """A connection that only reads, also where the folder is read-only and SQLite can put nothing beside the file."""
    uri = path.absolute().as_uri()
    try:
        connection, made = _opened(f"{uri}?mode=ro")
    except sqlite3.OperationalError:
        if os.access(path.parent, os.W_OK):
            raise
        connection, made = _opened(f"{uri}?immutable=1")
    if made:
        return connection
    connection.close()  # of a page that ended while it made the file
    connection, _ = _opened("file::memory:")
    connection.executescript(_TABLES)
    return connection


def _opened(uri: str) -> tuple[sqlite3.Connection, bool]:
    """A connection, and whether there are entries to read."""
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
