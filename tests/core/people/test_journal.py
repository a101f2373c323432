import itertools
import multiprocessing
import os
import signal
import sqlite3
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d3po_core.errors import D3POError
from d3po_core.people.journal import (
    JOURNAL_FILE,
    ConflictError,
    Journal,
    Submission,
    active,
    export_judgements,
    judgement_rows,
    read_entries,
    sampling_of,
)
from d3po_core.preferences.deriving import derive_preferences
from d3po_core.store.tables import SCHEMAS, connect, partition, read_rows
from tests.core.people.labelling import bring_in, waiting_campaign

counter = itertools.count()


def said(question: str = "mark_bad:r1-g0", rater: str = "ann", attempt: int = 0, **fields: object) -> Submission:
    usual: dict[str, object] = {
        "submission": f"{next(counter):032x}", "sampling": "s", "rater": rater, "question_id": question,
        "attempt": attempt, "action": "answer", "mode": "mark_bad", "shown": ("r1-g0-m1", "r1-g0-m0"),
        "answer": (0.0, 1.0), "seconds": 2.5,
    }  # fmt: skip
    return Submission(**(usual | fields))  # type: ignore[arg-type]


def undo_of(entry: Submission, number: int, attempt: int) -> Submission:
    return replace(entry, submission=f"{next(counter):032x}", action="undo", attempt=attempt, answer=None,
                   seconds=None, undoes=number)  # fmt: skip


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path)


def test_what_was_said_is_read_back_as_it_was(journal: Journal) -> None:
    submission = said(answer=(0.0, 1.0), seconds=1.25)
    entry, new = journal.append(submission)
    assert new
    [read] = journal.entries("s")
    assert read == entry
    assert all(getattr(read, name) == getattr(submission, name) for name in Submission.__dataclass_fields__)


def test_the_same_submission_sent_twice_is_kept_once(journal: Journal) -> None:
    submission = said()
    first, _ = journal.append(submission)
    again, new = journal.append(submission)
    assert not new
    assert again == first
    assert len(journal.entries("s")) == 1


def test_one_name_for_two_things_is_an_error_and_not_a_lost_judgement(journal: Journal) -> None:
    submission, _ = journal.append(said("a"))
    for other in ({"question_id": "b"}, {"answer": (1.0, 1.0)}, {"rater": "bob"}):
        with pytest.raises(ConflictError, match="other content"):
            journal.append(replace(said("a", submission=submission.submission), **other))


def test_of_two_windows_on_one_question_the_first_is_kept_and_the_second_is_told(journal: Journal) -> None:
    first, _ = journal.append(said(answer=(0.0, 1.0)))
    other, new = journal.append(said(answer=(1.0, 1.0)))
    assert not new
    assert other.submission == first.submission
    assert [entry.answer for entry in journal.entries("s")] == [(0.0, 1.0)]


def test_two_raters_on_one_question_are_both_kept(journal: Journal) -> None:
    assert journal.append(said(rater="ann"))[1]
    assert journal.append(said(rater="bob"))[1]


def test_an_entry_is_taken_back_once_and_stays_on_record(journal: Journal) -> None:
    entry, _ = journal.append(said())
    assert journal.append(undo_of(entry, entry.seq, 1))[1]
    assert not journal.append(undo_of(entry, entry.seq, 2))[1]
    assert [e.action for e in journal.entries("s")] == ["answer", "undo"]
    assert active(journal.entries("s")) == []


def test_an_attempt_that_was_never_offered_is_refused(journal: Journal) -> None:
    for attempt in (1, 7):
        with pytest.raises(ConflictError, match="never asked so often"):
            journal.append(said(attempt=attempt))
    assert journal.append(said())[1]
    with pytest.raises(ConflictError, match="never asked so often"):
        journal.append(said(attempt=2))
    assert len(journal.entries("s")) == 1


def test_a_journal_in_a_read_only_folder_is_read(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    journal.append(said())
    journal.close()
    connect = sqlite3.connect

    def read_only(path: str, **options: object) -> sqlite3.Connection:
        if "mode=ro" in path:  # what SQLite answers where it can put no file beside a journal
            raise sqlite3.OperationalError("attempt to write a readonly database")
        return connect(path, **options)  # type: ignore[call-overload,no-any-return]

    monkeypatch.setattr(sqlite3, "connect", read_only)
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert len(read_entries(journal.path.parent, "s")) == 1


def test_a_damaged_journal_that_is_only_read_promises_nothing_that_a_page_does(tmp_path: Path) -> None:
    (tmp_path / JOURNAL_FILE).write_bytes(b"no database" * 100)
    with pytest.raises(D3POError, match="restore the file") as caught:
        read_entries(tmp_path, "s")
    assert "sends it again" not in str(caught.value)


def test_entries_can_be_neither_changed_nor_deleted(journal: Journal) -> None:
    journal.append(said())
    connection = sqlite3.connect(journal.path)
    with pytest.raises(sqlite3.IntegrityError, match="append only"):
        connection.execute("DELETE FROM entries")
    with pytest.raises(sqlite3.IntegrityError, match="append only"):
        connection.execute("UPDATE entries SET answer = '[1, 1]'")


def test_times_grow_even_when_the_clock_is_set_back(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = journal.append(said("a"))
    monkeypatch.setattr(time, "time_ns", lambda: 0)
    second, _ = journal.append(said("b"))
    assert second.judged_at > first.judged_at


def test_another_sampling_of_the_round_never_gets_the_judgements_of_the_first(tmp_path: Path) -> None:
    config = waiting_campaign(tmp_path)
    before = sampling_of(config.folder, 1)
    assert before is not None
    Journal(config.folder).append(said(sampling=before))
    (config.folder / "stages/round=1/sample.json").write_text("{}")
    after = sampling_of(config.folder, 1)
    assert after not in (None, before)
    assert read_entries(config.folder, str(after)) == []
    assert export_judgements(config.folder, 1) == []


def test_threads_that_send_the_same_and_different_things_lose_and_double_nothing(journal: Journal) -> None:
    submissions = [said(f"q{number}", rater) for rater in ("ann", "bob") for number in range(20)]

    def send() -> None:
        for submission in submissions:
            journal.append(submission)

    threads = [threading.Thread(target=send) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kept = journal.entries("s")
    assert sorted(e.submission for e in kept) == sorted(s.submission for s in submissions)
    assert all(a.judged_at < b.judged_at for a, b in itertools.pairwise(kept))


def _judge_until_killed(folder: Path, told: object) -> None:
    journal = Journal(folder)
    for number in itertools.count():
        entry, _ = journal.append(said(f"q{number}"))
        told.send(entry.submission)  # type: ignore[attr-defined]


def test_what_was_confirmed_before_a_kill_is_there_after_it(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_judge_until_killed, args=(tmp_path, theirs))
    process.start()
    confirmed = [ours.recv() for _ in range(25)]
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    while ours.poll():
        confirmed.append(ours.recv())
    kept = [entry.submission for entry in Journal(tmp_path).entries("s")]
    assert kept[: len(confirmed)] == confirmed
    assert len(kept) <= len(confirmed) + 1  # one may have been written and not told


def test_a_journal_that_cannot_be_written_says_so_and_keeps_nothing(journal: Journal) -> None:
    journal._connection.execute("PRAGMA query_only = ON")
    with pytest.raises(D3POError, match="nothing was kept"):
        journal.append(said())
    journal._connection.execute("PRAGMA query_only = OFF")
    assert journal.entries("s") == []


def test_a_damaged_journal_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    (tmp_path / JOURNAL_FILE).write_bytes(b"not a database" * 100)
    with pytest.raises(D3POError, match=JOURNAL_FILE):
        Journal(tmp_path)


def test_reading_makes_no_journal(tmp_path: Path) -> None:
    assert read_entries(tmp_path, "s") == []
    assert list(tmp_path.iterdir()) == []


def entry_of(journal: Journal, **fields: object) -> list[dict[str, object]]:
    return judgement_rows(journal.append(said(**fields))[0])  # type: ignore[arg-type]


def test_marks_become_ratings_with_their_place_on_the_page(journal: Journal) -> None:
    rows = entry_of(journal, shown=("b", "c", "a"), answer=(0.0, 1.0, 1.0))
    assert {row["sample_id"]: (row["value"], row["position"]) for row in rows} == {
        "b": (0, 0), "c": (1, 1), "a": (1, 2)
    }  # fmt: skip
    assert {(r["kind"], r["rater_kind"], r["rater"], r["other_id"], r["seconds"]) for r in rows} == {
        ("rating", "human", "ann", None, 2.5)
    }


@pytest.mark.parametrize("mode", ["best", "rank"])
def test_best_and_rank_become_ranks(journal: Journal, mode: str) -> None:
    rows = entry_of(journal, mode=mode, shown=("b", "a"), answer=(1.0, 2.0))
    assert [(row["kind"], row["sample_id"], row["value"]) for row in rows] == [("rank", "b", 1), ("rank", "a", 2)]


@pytest.mark.parametrize(
    ("shown", "answer", "value", "position"),
    [
        (("a", "b"), (1, -1), 1, 0),
        (("b", "a"), (1, -1), -1, 1),
        (("b", "a"), (-1, 1), 1, 1),
        (("a", "b"), (0, 0), 0, 0),
    ],
)
def test_a_pair_becomes_one_choice_the_same_way_round_wherever_its_images_stood(
    journal: Journal, shown: tuple[str, str], answer: tuple[float, float], value: float, position: int
) -> None:
    [row] = entry_of(journal, mode="pair", shown=shown, answer=answer)
    assert (row["kind"], row["sample_id"], row["other_id"]) == ("choice", "a", "b")
    assert (row["value"], row["position"]) == (value, position)


@pytest.mark.parametrize("action", ["skip", "undo"])
def test_skips_and_undos_become_rows_without_a_value(journal: Journal, action: str) -> None:
    rows = entry_of(journal, action=action, answer=None)
    assert [row["value"] for row in rows] == [None, None]


def sampling(folder: Path) -> str:
    found = sampling_of(folder, 1)
    assert found is not None
    return found


def test_every_entry_is_exported_once_in_files_that_are_never_written_again(tmp_path: Path) -> None:
    config = waiting_campaign(tmp_path)
    journal = Journal(config.folder)
    assert export_judgements(config.folder, 1) == []
    first, _ = journal.append(said(sampling=sampling(config.folder)))
    [one] = export_judgements(config.folder, 1)
    content = one.read_bytes()
    assert export_judgements(config.folder, 1) == []
    journal.append(replace(undo_of(first, first.seq, 1), sampling=sampling(config.folder)))
    [two] = export_judgements(config.folder, 1)
    assert one.read_bytes() == content
    rows = [row for path in (one, two) for row in read_rows(path)]
    assert [row["value"] for row in rows] == [0, 1, None, None]
    assert SCHEMAS["judgements"].names == list(rows[0])


def test_exports_at_the_same_time_write_every_entry_once(tmp_path: Path) -> None:
    config = waiting_campaign(tmp_path)
    journal = Journal(config.folder)

    def judge_and_export(rater: str) -> None:
        for number in range(10):
            journal.append(said(f"q{number}", rater, sampling=sampling(config.folder)))
            export_judgements(config.folder, 1)

    threads = [threading.Thread(target=judge_and_export, args=(rater,)) for rater in ("ann", "bob", "cem")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    files = list(partition(config.folder, "judgements", 1).glob("page-*.parquet"))
    exported = [(row["rater"], row["judged_at"], row["sample_id"]) for path in files for row in read_rows(path)]
    expected = [
        (e.rater, e.judged_at, s) for e in read_entries(config.folder, sampling(config.folder)) for s in e.shown
    ]
    assert sorted(exported) == sorted(expected)
    assert len(expected) == 60


MODE_ANSWERS = {
    "mark_bad": st.lists(st.sampled_from([0.0, 1.0]), min_size=2, max_size=2),
    "pair": st.sampled_from([[1.0, -1.0], [-1.0, 1.0], [0.0, 0.0]]),
    "rank": st.sampled_from([[1.0, 2.0], [2.0, 1.0], [1.0, 1.0]]),
}


@given(st.sampled_from(sorted(MODE_ANSWERS)).flatmap(lambda mode: st.tuples(st.just(mode), MODE_ANSWERS[mode])),
       st.booleans(), st.booleans())  # fmt: skip
def test_what_is_derived_from_the_export_is_what_the_rater_said(
    tmp_path_factory: pytest.TempPathFactory, judged: tuple[str, list[float]], swapped: bool, taken_back: bool
) -> None:
    mode, answer = judged
    config = waiting_campaign(tmp_path_factory.mktemp("c"), groups=1, size=2)
    shown = ("r1-g0-m1", "r1-g0-m0") if swapped else ("r1-g0-m0", "r1-g0-m1")
    with_journal = Journal(config.folder)
    name = sampling(config.folder)
    entry, _ = with_journal.append(said(mode=mode, answer=tuple(answer), shown=shown, sampling=name))
    if taken_back:
        with_journal.append(undo_of(entry, entry.seq, 1))
    with_journal.close()
    export_judgements(config.folder, 1)
    with connect(config.folder) as connection:
        derived = derive_preferences(connection, 1, "majority", "all")
    goodness = [-value if mode == "rank" else value for value in answer]
    won = [] if goodness[0] == goodness[1] or taken_back else [shown[goodness.index(max(goodness))]]
    assert derived.table["winner_id"].to_pylist() == won
    assert derived.num_ties == (0 if taken_back else 1 - len(won))


def test_files_of_others_are_left_alone_by_the_export(tmp_path: Path) -> None:
    config = waiting_campaign(tmp_path)
    bring_in(config, [{"sample_id": "r1-g0-m0"}])
    Journal(config.folder).append(said(sampling=sampling(config.folder)))
    assert len(export_judgements(config.folder, 1)) == 1
    assert (partition(config.folder, "judgements", 1) / "csv.parquet").exists()
