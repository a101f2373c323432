"""Imports: all bad rows are told, nothing is written by halves, and what was said last counts."""

import json
import os
import stat
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from d3po_core.config import CampaignConfig
from d3po_core.errors import D3POError
from d3po_core.judgement_files import importing
from d3po_core.judgement_files.importing import import_file
from d3po_core.judgement_files.report import ImportReport, write_problems
from d3po_core.preferences.deriving import derive_preferences
from d3po_core.store.campaign import campaign_named
from d3po_core.store.tables import connect, read_rows
from tests.core.sampled import finish_derive, sampled_campaign

HEADER = "first_id,second_id,choice,rater,judged_at,seconds,position,prompt,campaign,round"
PAIR = "r3-g0-m0,r3-g0-m1"


@pytest.fixture
def campaign(tmp_path: Path) -> CampaignConfig:
    return sampled_campaign(tmp_path)


def bring(campaign: CampaignConfig, *lines: str, name: str = "labels.csv", **options: Any) -> ImportReport:
    """Import lines of text as a file."""
    file = campaign.folder.parent / name
    file.write_text("\n".join(lines) + "\n")
    return import_file(campaign.folder, file, **options)


def choice(said: str, ids: str = PAIR, rater: str = "anna", when: str = "", rest: str = ",,,,") -> str:
    return f"{ids},{said},{rater},{when},{rest}"


def votes(campaign: CampaignConfig) -> list[tuple[str, str]]:
    with connect(campaign.folder) as connection:
        table = derive_preferences(connection, 3, "majority", "all").table
    return [(row["winner_id"], row["loser_id"]) for row in table.to_pylist()]


def files(campaign: CampaignConfig) -> list[Path]:
    return [path for path in (campaign.folder / "judgements").rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (choice("first", "r3-g1-m0,r3-g1-m5"),
         "second_id 'r3-g1-m5' is not in round 3 of campaign 'shapes' (group r3-g1 has members 0 to 3)"),
        (choice("first", "r3-g1-m5,r3-g1-m0"),
         "first_id 'r3-g1-m5' is not in round 3 of campaign 'shapes' (group r3-g1 has members 0 to 3)"),
        (choice("first", "r3-g9-m0,r3-g0-m1"), "first_id 'r3-g9-m0' is not in round 3 of campaign 'shapes'"),
        (choice("first", "r2-g0-m0,r3-g0-m1"), "first_id 'r2-g0-m0' is of round 2, not of round 3"),
        (choice("first", "cat.png,r3-g0-m1"), "first_id 'cat.png' is no sample id; expected one like r3-g0-m1"),
        (choice("first", ",r3-g0-m1"), "first_id is empty"),
        (choice("first", "r3-g0-m0,r3-g1-m1"), "second_id 'r3-g1-m1' is in group r3-g1, r3-g0-m0 in r3-g0"),
        (choice("first", "r3-g0-m0,r3-g0-m0"), "second_id 'r3-g0-m0' is both images of the pair"),
        (choice("1st"), "choice '1st' is no choice; expected first, second, tie, both bad or skip"),
        (choice("1"), "choice '1' is no choice"),
        (choice("first", rater=""), "rater is empty"),
        (choice("first", rater="x" * 101), "is no name of a rater; expected up to 100 characters"),
        (choice("first", when="yesterday"), "judged_at 'yesterday' is no time; expected one like 2024-05-01T12:00:00Z"),
        (choice("first", when="1.5.2024"), "judged_at '1.5.2024' is no time"),
        (choice("first", when="2024-02-30T12:00:00Z"), "judged_at '2024-02-30T12:00:00Z' is no time"),
        (choice("first", when="1970-01-01"), "judged_at '1970-01-01' is no time"),
        (choice("first", when="2999-01-01"), "judged_at '2999-01-01' lies in the future"),
        (choice("first", rest="-1,,,,"), "seconds '-1' is no duration"),
        (choice("first", rest="nan,,,,"), "seconds 'nan' is no duration"),
        (choice("first", rest="1e999,,,,"), "seconds '1e999' is no duration"),
        (choice("first", rest=",1.5,,,"), "position '1.5' is no position"),
        (choice("first", rest=",-1,,,"), "position '-1' is no position"),
        (choice("first", rest=",,a blue circle,,"), "prompt 'a blue circle' is not the prompt of r3-g0-m0"),
        (choice("first", rest=",,,bright,"), "campaign 'bright' is not the campaign shapes"),
        (choice("first", rest=",,,,2"), "round '2' is not round 3"),
        (choice("first") + ",extra", "has 11 cells; expected 10 as in the header"),
        (choice("first", rest=",,,"), "has 9 cells; expected 10"),
        (choice("\x1b[31mfirst\x07"), r"choice '\x1b[31mfirst\x07' is no choice"),
    ],
)  # fmt: skip
def test_bad_row_is_told_with_its_number_value_and_remedy(campaign: CampaignConfig, line: str, message: str) -> None:
    good = choice("first", "r3-g2-m0,r3-g2-m1")
    report = bring(campaign, HEADER, good, line, good.replace("g2", "g3"))
    told = list(report.problem_lines())
    assert told
    assert all(line.startswith("labels.csv row 3: ") for line in told)
    assert any(message in line for line in told), told
    assert (report.num_good, report.num_bad, report.num_rows, report.accepted) == (2, 1, 3, False)
    assert files(campaign) == []
    left = bring(campaign, HEADER, good, line, good.replace("g2", "g3"), accept_valid=True)
    assert left.written is not None
    assert [row["sample_id"] for row in read_rows(left.written)] == ["r3-g2-m0", "r3-g3-m0"]
    assert "left out: 1 wrong row" in left.summary()[-1]


@pytest.mark.parametrize(
    ("header", "line", "message"),
    [
        ("sample_id,rating,rater", "r3-g0-m0,wonderful,anna", "'wonderful' is no rating; expected a finite number"),
        ("sample_id,rating,rater", "r3-g0-m0,1e999,anna", "rating '1e999' is no rating"),
        ("sample_id,rating,rater", "r3-g0-m0,nan,anna", "rating 'nan' is no rating"),
        ("sample_id,rating,rater", "r3-g0-m0,1_0,anna", "rating '1_0' is no rating"),
        ("sample_id,rating,rater", "r3-g0-m0,\u0663,anna", "rating '\u0663' is no rating"),
        ("sample_id,rating,rater", "r3-g0-m0,5,anna\nr3-g0-m1,good,anna", "rating '5' is a number beside good and bad"),
        ("group_id,sample_id,rank,rater", "r3-g0,r3-g0-m0,5,anna", "rank '5' is no rank; expected 1 for the best to 4"),
        ("group_id,sample_id,rank,rater", "r3-g0,r3-g0-m0,0,anna", "rank '0' is no rank"),
        ("group_id,sample_id,rank,rater", "r3-g0,r3-g0-m0,1.5,anna", "rank '1.5' is no rank"),
        ("group_id,sample_id,rank,rater", "r3-g1,r3-g0-m0,1,anna", "group_id 'r3-g1' is not the group of r3-g0-m0"),
        ("file_path,caption,label", "a/0001.png,a red circle,1", "file_path 'a/0001.png' is no sample id"),
        ("file_path,caption,label", "r3-g0-m0.png,a blue circle,1", "caption 'a blue circle' is not the prompt"),
    ],
)  # fmt: skip
def test_values_out_of_range_are_told(campaign: CampaignConfig, header: str, line: str, message: str) -> None:
    report = bring(campaign, header, line, rater="zoe")
    assert message in next(report.problem_lines())
    assert files(campaign) == []


def test_all_bad_rows_are_counted_and_written_to_the_report(campaign: CampaignConfig, tmp_path: Path) -> None:
    report = bring(campaign, HEADER, *(choice("1st", f"r3-g0-m{n},zz{n}") for n in range(100)))
    lines = report.summary()
    assert len(lines) == 24
    assert lines[20] == "... and 276 more problems", "100 choices, 100 second ids, 96 first ids"
    assert "100 rows wrong" in lines[21]
    told = write_problems(report, tmp_path / "problems.txt").read_text().splitlines()
    assert len(told) == len(report.problems)
    assert {int(line.split()[2].rstrip(":")) for line in told} == set(range(2, 102))


def test_empty_rows_are_not_judged_yet_and_skip_is_no_opinion(campaign: CampaignConfig) -> None:
    lines = [choice(""), choice("skip", "r3-g0-m2,r3-g0-m3"), choice("", "nonsense,nonsense")]
    report = bring(campaign, HEADER, *lines)
    assert report.num_empty == 2
    assert report.written is not None
    assert [(row["sample_id"], row["value"]) for row in read_rows(report.written)] == [("r3-g0-m2", None)]


def test_same_file_twice_changes_nothing(campaign: CampaignConfig) -> None:
    first = bring(campaign, HEADER, choice("first"))
    assert first.written is not None
    content, changed = first.written.read_bytes(), first.written.stat().st_mtime_ns
    second = bring(campaign, HEADER, choice("first"), name="copy of labels.csv")
    assert second.already
    assert second.accepted
    assert second.written is None
    assert files(campaign) == [first.written]
    assert (first.written.read_bytes(), first.written.stat().st_mtime_ns) == (content, changed)


def test_same_file_for_two_raters_is_two_imports(campaign: CampaignConfig) -> None:
    for rater in ("anna", "ben"):
        assert bring(campaign, "sample_id,rating", "r3-g0-m0,1", rater=rater).raters == {rater: 1}
    assert len(files(campaign)) == 2


def test_two_imports_at_once_of_one_file_write_one(campaign: CampaignConfig) -> None:
    file = campaign.folder.parent / "labels.csv"
    file.write_text(f"{HEADER}\n{choice('first')}\n")
    reports: list[ImportReport] = []
    threads = [threading.Thread(target=lambda: reports.append(import_file(campaign.folder, file))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(report.written is not None for report in reports) == 1
    assert sum(report.already for report in reports) == 3


def test_later_judgement_replaces_the_earlier_and_both_stay(campaign: CampaignConfig) -> None:
    bring(campaign, HEADER, choice("first"))
    assert votes(campaign) == [("r3-g0-m0", "r3-g0-m1")]
    bring(campaign, HEADER, choice("first", "r3-g0-m1,r3-g0-m0"))
    assert votes(campaign) == [("r3-g0-m1", "r3-g0-m0")], "a row without a time counts as judged when it is imported"
    bring(campaign, HEADER, choice("first", when="2024-05-01"))
    assert votes(campaign) == [("r3-g0-m1", "r3-g0-m0")], "what was judged before is not the later word"
    bring(campaign, HEADER, choice("skip", when=datetime.now(UTC).isoformat()))
    assert votes(campaign) == []
    with connect(campaign.folder) as connection:
        assert connection.sql("SELECT count(*) FROM judgements").fetchall() == [(4,)]


def test_what_is_imported_after_the_clock_was_set_back_is_the_later_word(
    campaign: CampaignConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    bring(campaign, HEADER, choice("first"))

    class AnHourAgo(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.now(tz) - timedelta(hours=1)

    monkeypatch.setattr(importing, "datetime", AnHourAgo)
    bring(campaign, HEADER, choice("first", "r3-g0-m1,r3-g0-m0"))
    assert votes(campaign) == [("r3-g0-m1", "r3-g0-m0")]


def test_order_within_a_file_is_that_of_judged_at(campaign: CampaignConfig) -> None:
    report = bring(
        campaign, HEADER, choice("second", when="2024-05-02T00:00:00+02:00"), choice("first", when="2024-05-01T21:59Z")
    )
    assert report.num_good == 2
    assert votes(campaign) == [("r3-g0-m1", "r3-g0-m0")]


@pytest.mark.parametrize("zone", ["+99:99", "-16:00", "+02:60"])
def test_a_zone_that_no_place_has_is_no_time(zone: str, campaign: CampaignConfig) -> None:
    (line,) = bring(campaign, HEADER, choice("first", when=f"2024-05-01T12:00:00{zone}")).problem_lines()
    assert "is no time" in line


def test_different_words_at_one_time_are_refused_since_nobody_knows_which_is_later(campaign: CampaignConfig) -> None:
    again = "r3-g0-m1,r3-g0-m0"
    report = bring(campaign, HEADER, choice("first"), choice("first", again), choice("tie", "r3-g1-m0,r3-g1-m1"))
    assert [line.partition(": ")[0] for line in report.problem_lines()] == ["labels.csv row 2", "labels.csv row 3"]
    assert "is said by anna in row 3 too, differently; keep one" in next(report.problem_lines())
    same = bring(campaign, HEADER, choice("first"), choice("second", again), dry_run=True)
    assert (same.num_good, same.num_bad, same.num_repeated) == (1, 0, 1), "the same once more is kept once"
    corrected = bring(campaign, HEADER, choice("1st"), choice("first"), accept_valid=True)
    assert (corrected.num_good, corrected.num_bad) == (1, 1), "a wrong row is no repeat of a right one"


def test_repeats_are_found_across_the_chunks_that_are_checked_at_once(
    campaign: CampaignConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("d3po_core.judgement_files.checks.CHUNK", 2)
    ids = [f"r3-g{group}-m0,r3-g{group}-m1" for group in (0, 1, 2, 3, 0)]
    report = bring(campaign, HEADER, *(choice("first", pair) for pair in ids))
    assert (report.num_good, report.num_bad, report.num_repeated) == (4, 0, 1)


def test_dry_run_tells_all_and_writes_nothing(campaign: CampaignConfig) -> None:
    report = bring(campaign, HEADER, choice("first"), dry_run=True)
    assert (report.num_good, report.written, report.accepted) == (1, None, True)
    assert files(campaign) == []


def test_round_is_the_one_that_the_ids_name(campaign: CampaignConfig) -> None:
    assert bring(campaign, "sample_id,rating", "r2-g0-m0,1", rater="zoe").round_number == 2
    assert bring(campaign, "sample_id,rating", "cat,1", rater="zoe").round_number == 3
    mixed = bring(campaign, "sample_id,rating", "r2-g0-m0,1", "r2-g0-m1,1", "r3-g0-m1,1", rater="zoe")
    assert (mixed.round_number, mixed.num_bad, mixed.elsewhere) == (2, 0, {3: 1}), "left out, and said so"
    assert "rows of other rounds (1 of round 3)" in "\n".join(mixed.summary())
    other = bring(campaign, "sample_id,rating", "r2-g0-m0,1", rater="zoe", round_number=3)
    assert "is of round 2, not of round 3" in next(other.problem_lines())


def test_file_of_a_round_that_does_not_exist_is_refused(campaign: CampaignConfig) -> None:
    with pytest.raises(D3POError, match=r"is of round 7, of which campaign 'shapes' has no images; .*1, 2, 3"):
        bring(campaign, "sample_id,rating", "r7-g0-m0,1", rater="zoe")


def test_campaign_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(D3POError, match="has no images to judge yet; sample a round first"):
        bring(sampled_campaign(tmp_path, rounds=0), "sample_id,rating", "r1-g0-m0,1", rater="zoe")


def test_derived_round_takes_judgements_only_when_told_so(campaign: CampaignConfig) -> None:
    finish_derive(campaign, 3)
    with pytest.raises(D3POError, match=r"round 3 of campaign 'shapes' are derived already: .*add --late"):
        bring(campaign, HEADER, choice("first"))
    assert files(campaign) == []
    report = bring(campaign, HEADER, choice("first"), late=True)
    assert report.late
    assert len(files(campaign)) == 1
    assert "training does not change any more" in report.summary()[-1]


def test_gold_answers_have_their_own_rater_and_kind(campaign: CampaignConfig) -> None:
    report = bring(campaign, "sample_id,rating", "r3-g0-m0,1", gold=True)
    assert report.written is not None
    assert [(row["rater"], row["rater_kind"]) for row in read_rows(report.written)] == [("gold", "gold")]


def test_gold_answers_never_replace_a_persons(campaign: CampaignConfig) -> None:
    bring(campaign, HEADER, choice("first"))
    report = bring(campaign, HEADER, choice("second"), gold=True)
    assert "rater 'anna' judged round 3 of campaign 'shapes' as another kind of rater" in next(report.problem_lines())
    assert len(files(campaign)) == 1


def test_file_without_raters_asks_who_judged(campaign: CampaignConfig) -> None:
    with pytest.raises(D3POError, match="does not say who judged; add a column rater, or --rater NAME"):
        bring(campaign, "sample_id,rating", "r3-g0-m0,1")
    with pytest.raises(D3POError, match="--rater is empty"):
        bring(campaign, "sample_id,rating", "r3-g0-m0,1", rater=" ")
    report = bring(campaign, "sample_id,rating,rater", "r3-g0-m0,1,anna", "r3-g0-m1,1,", rater=" Zoe  B ")
    assert report.raters == {"anna": 1, "Zoe B": 1}


def test_sheet_of_a_campaign_started_anew_is_refused(campaign: CampaignConfig, tmp_path: Path) -> None:
    manifest = {"campaign": "shapes", "campaign_id": "another", "order": [["r3-g0-m0"]]}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(D3POError, match="is of a sheet of campaign 'shapes', started at another time"):
        bring(campaign, HEADER, choice("first"))


def test_file_that_changes_while_it_is_checked_is_refused(
    campaign: CampaignConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = importing.check_judgements

    def slow_check(*arguments: Any) -> Any:
        (campaign.folder.parent / "labels.csv").write_text("somebody saved it again")
        return check(*arguments)

    monkeypatch.setattr(importing, "check_judgements", slow_check)
    with pytest.raises(D3POError, match="changed while it was checked"):
        bring(campaign, HEADER, choice("first"))
    assert files(campaign) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_that_cannot_be_written_is_one_line(campaign: CampaignConfig) -> None:
    folder = campaign.folder / "judgements"
    folder.mkdir()
    folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(D3POError, match="cannot write"):
        bring(campaign, HEADER, choice("first"))


def test_importing_takes_no_lock_of_the_campaign(campaign: CampaignConfig) -> None:
    from d3po_core.store.campaign import campaign_lock

    with campaign_lock(campaign.folder, "a run"):
        assert bring(campaign, HEADER, choice("first")).accepted


def test_time_of_import_is_utc_without_a_zone(campaign: CampaignConfig) -> None:
    report = bring(campaign, HEADER, choice("first"))
    assert report.written is not None
    judged_at = read_rows(report.written)[0]["judged_at"]
    assert abs(judged_at - datetime.now(UTC).replace(tzinfo=None)) < timedelta(minutes=5)


def test_campaign_that_does_not_exist_is_named_with_those_that_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("D3PO_DATA", str(tmp_path))
    config = sampled_campaign(tmp_path / "runs")
    assert campaign_named("shapes").folder == config.folder
    with pytest.raises(D3POError, match=r"campaign 'shape' is not in .*; there are shapes"):
        campaign_named("shape")
    with pytest.raises(D3POError, match=r"campaign is '\.\.'"):
        campaign_named("..")


def test_campaign_that_lies_elsewhere_is_named_by_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("D3PO_DATA", str(tmp_path / "data"))
    config = sampled_campaign(tmp_path / "disk")
    found = campaign_named(str(config.folder))
    assert (found.folder, found.campaign) == (config.folder, "shapes")
    with pytest.raises(D3POError, match=r"not in .*data/runs; there are none; of one that lies elsewhere give the fol"):
        campaign_named("shapes")
    with pytest.raises(D3POError, match=r"disk holds no campaign; expected a name, or a campaign's folder"):
        campaign_named(str(tmp_path / "disk"))
