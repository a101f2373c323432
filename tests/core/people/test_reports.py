"""Raters' reports of images: what is kept, what counts, and what an owner reads."""

import threading
from pathlib import Path

import pytest

from d3po_core.config import CampaignConfig
from d3po_core.errors import D3POError
from d3po_core.people.reports import ImageReports
from d3po_core.queries.views import connect_views
from d3po_core.store.leftovers import discard_round
from d3po_core.store.tables import connect
from tests.core.people.labelling import waiting_campaign

IMAGE = "images/round=1/r1-g0-m1.png"


@pytest.fixture
def config(tmp_path: Path) -> CampaignConfig:
    return waiting_campaign(tmp_path)


def test_the_last_word_of_each_rater_counts_and_all_stays_on_record(config: CampaignConfig) -> None:
    reports = ImageReports(config.folder)
    for number, (rater, reason) in enumerate(
        [("ann", "unsafe"), ("bob", "broken"), ("ann", "broken"), ("bob", "withdrawn"), ("cem", "unsafe")]
    ):
        reports.add(rater, "r1-g0-m1", IMAGE, reason, f"page-{number}")  # type: ignore[arg-type]
    expected = {"r1-g0-m1": {"ann": "broken", "cem": "unsafe"}}
    assert reports.standing() == ImageReports(config.folder).standing() == expected
    assert reports.lines() == reports.lines(1) == ["reported: r1-g0-m1 is broken and unsafe (ann, cem)"]
    assert reports.lines(2) == []
    with connect_views(config.folder) as connection:
        told = connection.sql("SELECT sample_id, prompt, image_path, rater, reason FROM reported_images ORDER BY rater")
        assert told.fetchall() == [
            ("r1-g0-m1", "prompt <b>0</b> & co", IMAGE, rater, reason) for rater, reason in expected["r1-g0-m1"].items()
        ]
        assert connection.sql("SELECT count(*) FROM image_reports").fetchall() == [(5,)]


def test_what_is_sent_twice_or_said_again_is_kept_once(config: CampaignConfig) -> None:
    reports = ImageReports(config.folder)
    for name in ("page-a", "page-a", "page-b"):
        reports.add("ann", "r1-g0-m1", IMAGE, "unsafe", name)
    reports.add("bob", "r1-g0-m1", IMAGE, "withdrawn", "page-c")  # takes nothing back
    with connect(config.folder) as connection:
        assert connection.sql("SELECT rater FROM image_reports").fetchall() == [("ann",)]


def test_an_image_that_is_drawn_anew_is_not_the_one_that_was_reported(config: CampaignConfig) -> None:
    ImageReports(config.folder).add("ann", "r1-g0-m1", IMAGE, "unsafe", "page-a")
    before = (config.folder / IMAGE).read_bytes()
    (config.folder / IMAGE).write_bytes((config.folder / "images/round=1/r1-g1-m0.png").read_bytes())
    assert ImageReports(config.folder).standing() == {}
    (config.folder / IMAGE).write_bytes(before)
    assert ImageReports(config.folder).standing() == {"r1-g0-m1": {"ann": "unsafe"}}


def test_reports_go_with_their_round(config: CampaignConfig) -> None:
    (config.folder / "rounds/round=0").mkdir(parents=True)  # the base is finished
    (config.folder / "rounds/round=0/part.parquet").touch()
    ImageReports(config.folder).add("ann", "r1-g0-m1", IMAGE, "unsafe", "page-a")
    assert discard_round(config.folder) == 1
    assert ImageReports(config.folder).standing() == {}


def test_reports_at_the_same_time_are_all_kept(config: CampaignConfig) -> None:
    reports = ImageReports(config.folder)
    names = [f"rater {number}" for number in range(8)]
    threads = [
        threading.Thread(target=reports.add, args=(name, "r1-g0-m1", IMAGE, "unsafe", f"page-{name}")) for name in names
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(reports.standing()["r1-g0-m1"]) == names


def test_an_image_whose_file_is_gone_cannot_be_reported(config: CampaignConfig) -> None:
    (config.folder / IMAGE).unlink()
    with pytest.raises(D3POError, match="nothing to report"):
        ImageReports(config.folder).add("ann", "r1-g0-m1", IMAGE, "unsafe", "page-a")
