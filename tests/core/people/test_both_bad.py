""" "Both bad" in pair mode: an answer of its own from the page and from files to the tables, and a tie for training."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from d3po_core.config import CampaignConfig
from d3po_core.judgement_files.importing import import_file
from d3po_core.people.journal import Journal, Submission, export_judgements, sampling_of
from d3po_core.people.raters import connect_with_journal, rater_report
from d3po_core.people.tally import answer_problem
from d3po_core.preferences.deriving import derive_preferences
from d3po_core.queries.views import connect_views
from d3po_core.store.tables import connect, partition
from tests.core.people.labelling import bring_in, waiting_campaign

BETTER, WORSE, TIE, BOTH_BAD = (1.0, -1.0), (-1.0, 1.0), (0.0, 0.0), (-1.0, -1.0)
FIRST, SECOND = "r1-g0-m0", "r1-g0-m1"


@pytest.fixture
def config(tmp_path: Path) -> CampaignConfig:
    return waiting_campaign(tmp_path, size=2, mode="pair")


def say(config: CampaignConfig, rater: str, answer: tuple[float, ...] | None, group: int = 0, **changes: Any) -> None:
    """An answer of the page, with the second image on the left."""
    said = {
        "submission": f"{rater}{group}{changes.get('attempt', 0)}", "sampling": str(sampling_of(config.folder, 1)),
        "rater": rater, "question_id": f"pair:r1-g{group}:0:1", "attempt": 0, "action": "answer", "mode": "pair",
        "shown": (f"r1-g{group}-m1", f"r1-g{group}-m0"), "answer": answer, "seconds": 1.0,
    } | changes  # fmt: skip
    journal = Journal(config.folder)
    journal.append(Submission(**said))
    journal.close()


@pytest.mark.parametrize(
    ("answer", "fits"), [(BETTER, True), (TIE, True), (BOTH_BAD, True), ((1.0, 1.0), False), ((0.0, -1.0), False)]
)
def test_both_bad_is_an_answer_to_a_pair_and_to_nothing_else(answer: tuple[float, ...], fits: bool) -> None:
    assert (answer_problem("pair", answer, 2) is None) == fits
    assert answer_problem("mark_bad", BOTH_BAD, 2) is not None


def test_it_reaches_the_tables_and_the_views_apart_from_a_tie(config: CampaignConfig) -> None:
    for rater, answer in {"ann": BOTH_BAD, "bob": TIE, "cem": BETTER}.items():
        say(config, rater, answer)
    export_judgements(config.folder, 1)
    with connect_views(config.folder) as connection:
        rows = connection.sql("SELECT rater, sample_id, value, both_bad FROM judgements ORDER BY rater").fetchall()
        assert rows == [("ann", FIRST, 0.0, True), ("bob", FIRST, 0.0, False), ("cem", FIRST, -1.0, False)]
        votes = connection.sql("SELECT rater, vote, both_bad FROM votes ORDER BY rater").fetchall()
        assert votes == [("ann", 0, True), ("bob", 0, False), ("cem", -1, False)]
        counted = connection.sql("SELECT rater, num_ties, num_both_bad FROM raters ORDER BY rater").fetchall()
        assert counted == [("ann", 1, 1), ("bob", 1, 0), ("cem", 0, 0)]


def test_for_pairs_it_is_a_tie_and_makes_none(config: CampaignConfig) -> None:
    say(config, "ann", BOTH_BAD)
    say(config, "ann", BETTER, group=1)
    export_judgements(config.folder, 1)
    with connect(config.folder) as connection:
        derived = derive_preferences(connection, 1, "majority", "all")
    assert derived.table["winner_id"].to_pylist() == ["r1-g1-m1"]
    assert derived.num_ties == 1


def test_raters_are_told_of_it_and_an_answer_taken_back_is_not_counted(config: CampaignConfig) -> None:
    say(config, "ann", BOTH_BAD)
    say(config, "ann", BOTH_BAD, group=1)
    say(config, "ann", None, group=1, attempt=1, action="undo", undoes=2)
    say(config, "bob", TIE)
    with connect_with_journal(config.folder) as connection:
        report = rater_report(connection, 0.6)
    assert [(r.rater, r.judgements, r.both_bad, r.taken_back) for r in report.raters] == [
        ("ann", 1, 1, 1), ("bob", 1, 0, 0)
    ]  # fmt: skip
    assert report.agreement == 1.0, "of the two images neither is better, say both"


def test_a_gold_answer_with_a_winner_counts_it_as_half_right(config: CampaignConfig) -> None:
    say(config, "ann", BOTH_BAD)
    bring_in(
        config, [{"rater": "gold", "rater_kind": "gold", "kind": "choice", "sample_id": FIRST, "other_id": SECOND}]
    )
    with connect_with_journal(config.folder) as connection:
        [ann] = rater_report(connection, 0.6).raters
    assert (ann.gold_answered, ann.gold_right) == (1, 0.5)


@pytest.mark.parametrize(
    ("word", "value", "both_bad"),
    [("both bad", 0.0, True), ("Tie (bothbad)", 0.0, True), ("neither is good", 0.0, True), ("neither", 0.0, False),
     ("tie", 0.0, False), ("left", 1.0, False), ("skip", None, None)],
)  # fmt: skip
def test_words_of_files_mean_it(
    config: CampaignConfig, tmp_path: Path, word: str, value: float | None, both_bad: bool | None
) -> None:
    path = tmp_path / "labels.csv"
    path.write_text(f"first_id,second_id,choice,rater\n{FIRST},{SECOND},{word},ann\n")
    assert import_file(config.folder, path).accepted
    with connect(config.folder) as connection:
        assert connection.sql("SELECT value, both_bad FROM judgements").fetchall() == [(value, both_bad)]


def test_a_tie_and_both_bad_at_one_time_contradict_each_other(config: CampaignConfig, tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    header, when = "first_id,second_id,choice,rater,judged_at", "2024-05-01T12:00:00Z"
    rows = [f"{FIRST},{SECOND},tie,ann,{when}", f"{SECOND},{FIRST},both bad,ann,{when}"]
    path.write_text("\n".join([header, *rows]) + "\n")
    report = import_file(config.folder, path)
    assert not report.accepted
    assert all("differently" in message for message in report.problems["message"].to_pylist())
    path.write_text("\n".join([header, rows[1], rows[1]]) + "\n")
    report = import_file(config.folder, path)
    assert (report.accepted, report.num_repeated) == (True, 1)
    path.write_text("\n".join([header, rows[0]]) + "\n")
    assert import_file(config.folder, path).num_known == 0, "a plain tie is not what is on record"


def test_files_from_before_are_read_as_before(config: CampaignConfig) -> None:
    say(config, "ann", TIE)
    [path] = export_judgements(config.folder, 1)
    pq.write_table(pq.ParquetFile(path).read().drop_columns(["both_bad"]), path)
    with connect_views(config.folder) as connection:
        assert connection.sql("SELECT value, both_bad FROM judgements").fetchall() == [(0.0, None)]
        assert connection.sql("SELECT vote, both_bad FROM votes").fetchall() == [(0, False)]
    assert partition(config.folder, "judgements", 1).exists()
