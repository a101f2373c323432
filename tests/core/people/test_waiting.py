"""What a campaign waits for: counts by hand, for whom, and that looking changes nothing."""

import json
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from d3po_core.config import CampaignConfig
from d3po_core.people.invitations import invite, revoke
from d3po_core.people.journal import Journal, Submission, export_judgements, sampling_of
from d3po_core.people.on_page import ask_with_page, on_page
from d3po_core.people.waiting import RaterNow, campaign_now, open_round, waiting_line
from d3po_core.store.stages import stage_path
from tests.core.people.labelling import bring_in, waiting_campaign


def say(config: CampaignConfig, rater: str, group: int, action: str = "answer", undoes: int | None = None) -> int:
    """Put an entry of a marked group into the journal; return its number."""
    journal = Journal(config.folder)
    sampling = str(sampling_of(config.folder, 1))
    question = f"mark_bad:r1-g{group}"
    attempt = sum(e.rater == rater and e.question_id == question for e in journal.entries(sampling))
    shown = tuple(f"r1-g{group}-m{member}" for member in range(3))
    answer = (0.0, 1.0, 1.0) if action == "answer" else None
    said = Submission(
        f"{rater}{group}{attempt}", sampling, rater, question, attempt, action, "mark_bad", shown, answer, 2.0, undoes
    )
    number = journal.append(said)[0].seq
    journal.close()
    return number


def files(folder: Path) -> dict[str, bytes]:
    """All files with what they hold, without those that SQLite makes for readers."""
    there = [path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(("-wal", "-shm"))]
    return {str(path): path.read_bytes() for path in there}


def by_name(raters: tuple[RaterNow, ...]) -> dict[str, RaterNow]:
    return {rater.name: rater for rater in raters}


def test_groups_are_counted_and_what_was_taken_back_stands_apart(tmp_path: Path) -> None:
    config = waiting_campaign(tmp_path, groups=4, pixels=1)
    invite(config.folder, "ann", 3)
    invite(config.folder, "bob")
    first = say(config, "ann", 0)
    say(config, "ann", 0, "undo", undoes=first)
    say(config, "ann", 0)
    say(config, "ann", 1, "skip")
    say(config, "bob", 2)
    bring_in(config, [{"sample_id": f"r1-g3-m{member}", "rater": "carl"} for member in range(3)])
    before = files(config.folder)
    now = campaign_now(config.folder, ["ann", "bob"])
    assert files(config.folder) == before
    raters = by_name(now.raters)
    ann, bob, carl = raters["ann"], raters["bob"], raters["carl"]
    assert (ann.access, ann.quota, ann.groups, ann.answers, ann.skips, ann.taken_back, ann.left) == (
        "invited", 3, 1, 1, 1, 1, 1
    )  # fmt: skip
    assert (bob.groups, bob.answers, bob.left) == (1, 1, 1)
    assert (carl.access, carl.groups, carl.answers, carl.left, carl.last_at) == ("none", 1, 0, 0, None)
    assert now.round is not None
    assert (now.round.progress.groups_done, now.round.progress.groups_needed) == (3, 4)
    assert waiting_line(now) == (
        "round 1 waits for people: 3 of 4 groups judged (1 answers missing); may judge the rest: ann (1), bob (1)"
    )


def test_the_deadline_and_those_who_may_not_judge_are_said(tmp_path: Path) -> None:
    config = waiting_campaign(tmp_path, groups=2, pixels=1)
    invite(config.folder, "ann")
    revoke(config.folder, "ann")
    noted = {"since": "2026-01-01T00:00:00+00:00", "deadline": "2026-01-02T09:30:00+00:00", "flow_run_id": "x"}
    stage_path(config.folder, 1, "waiting").write_text(json.dumps(noted))
    now = campaign_now(config.folder, [])
    assert now.round is not None
    assert now.round.deadline == datetime(2026, 1, 2, 9, 30, tzinfo=UTC)
    assert by_name(now.raters)["ann"].access == "revoked"
    line = str(waiting_line(now))
    assert line.startswith("round 1 waits for people until 2026-01-02 09:30 UTC: 0 of 2 groups judged")
    assert "invite somebody (d3po invite NAME --campaign x)" in line


def test_a_round_that_has_enough_or_went_on_waits_for_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = waiting_campaign(tmp_path, groups=2, pixels=1, enough=0.5)
    say(config, "ann", 0)
    assert waiting_line(campaign_now(config.folder, ["ann"])) == "round 1 has the judgements it needs; its run goes on"
    monkeypatch.setattr("d3po_core.people.waiting.TAKEN_UP", timedelta())
    line = waiting_line(campaign_now(config.folder, ["ann"]))
    assert line is not None
    assert "its run has not gone on for 0 minutes" in line
    stage_path(config.folder, 1, "label").write_text("{}")
    assert open_round(config.folder) is None
    now = campaign_now(config.folder, ["ann"])
    assert now.round is None
    assert waiting_line(now) is None
    assert [rater.name for rater in now.raters] == ["ann"]


def test_proxies_rounds_wait_for_nobody(tmp_path: Path) -> None:
    assert open_round(waiting_campaign(tmp_path, pixels=1, labeller="proxy").folder) is None


def test_sql_sees_what_the_page_holds_until_a_table_does(tmp_path: Path) -> None:
    config = waiting_campaign(tmp_path, groups=3, pixels=1)
    first = say(config, "ann", 0)
    say(config, "ann", 0, "undo", undoes=first)
    say(config, "ann", 1)
    say(config, "bob", 2, "skip")
    sql = "SELECT rater, group_id, answer, skipped, taken_back, round FROM page_judgements ORDER BY ALL"
    with ask_with_page(config.folder, sql) as answer:
        assert answer.fetchall() == [
            ("ann", "r1-g0", [0.0, 1.0, 1.0], False, True, 1),
            ("ann", "r1-g1", [0.0, 1.0, 1.0], False, False, 1),
            ("bob", "r1-g2", None, True, False, 1),
        ]
    export_judgements(config.folder, 1)
    say(config, "bob", 0)
    with ask_with_page(config.folder, sql) as answer:
        assert answer.fetchall() == [("bob", "r1-g0", [0.0, 1.0, 1.0], False, False, 1)]


def test_a_campaign_without_a_journal_has_an_empty_view(tmp_path: Path) -> None:
    config = waiting_campaign(tmp_path, pixels=1)
    with ask_with_page(config.folder, "SELECT count(*) FROM page_judgements") as answer:
        assert answer.fetchall() == [(0,)]


def test_it_is_read_while_the_page_writes(tmp_path: Path) -> None:
    config = waiting_campaign(tmp_path, groups=40, pixels=1)
    say(config, "ann", 0)

    def write() -> None:
        for group in range(1, 40):
            say(config, "ann", group)

    writer, seen = threading.Thread(target=write), []
    writer.start()
    while writer.is_alive():
        seen.append((by_name(campaign_now(config.folder, ["ann"]).raters)["ann"].answers, len(on_page(config.folder))))
    writer.join()
    assert seen == sorted(seen)
    assert len(on_page(config.folder)) == by_name(campaign_now(config.folder, ["ann"]).raters)["ann"].answers == 40
