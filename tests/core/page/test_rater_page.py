"""What a rater's page offers beside the answer: reports, marks that come back, the last answer, the guideline."""

import re
import time
from html import unescape
from pathlib import Path

import pytest

from d3po_core.people.reports import ImageReports
from d3po_core.store.stages import stage_path
from tests.core.page.test_page import ORIGIN, Rater, eventually, said, served
from tests.core.people.labelling import waiting_campaign


def report(rater: Rater, image: int, reason: str = "unsafe", **other: object) -> int:
    response = rater.post("report", ticket=rater.ticket, image=image, reason=reason, **other)
    if response.status_code == 200:
        rater.see(response.json()["html"])
    return response.status_code


def flags(rater: Rater) -> list[str]:
    return [flag.strip() for flag in re.findall(r'<div class="tile ([a-z]*)', rater.html)]


# ------------------------------------------------------------------------------------------- reports


def test_a_reported_image_is_hidden_from_others_and_stops_nobody(tmp_path: Path) -> None:
    config = waiting_campaign(tmp_path, groups=1, raters_per_group=2, pixels=4)
    with served(tmp_path) as enter:
        ann, bob = enter("ann"), enter("bob")
        shown = ann.http.get(ann.images[1]).content
        assert report(ann, 1) == 200
        assert flags(ann) == ["", "mine", ""]
        hidden = [flag == "hidden" for flag in flags(bob.open())]
        assert [bob.http.get(url).content == shown for url in bob.images] == hidden
        for rater in (ann, bob):
            rater.judge([0, 1, 1])
        assert bob.state == "done"
    assert len(said(config)) == 2


def test_a_report_is_taken_back_by_who_made_it_only(tmp_path: Path) -> None:
    waiting_campaign(tmp_path, groups=1, raters_per_group=2)
    with served(tmp_path) as enter:
        ann, bob = enter("ann"), enter("bob")
        report(ann, 0)
        at = flags(bob.open()).index("hidden")
        report(bob, at, "withdrawn")
        assert flags(bob)[at] == "hidden"
        report(ann, 0, "withdrawn")
        assert flags(ann) == ["", "", ""] == flags(bob.open())


def test_blurring_can_be_switched_off(tmp_path: Path) -> None:
    config = waiting_campaign(tmp_path, groups=1, raters_per_group=2, blur_reported=False)
    with served(tmp_path) as enter:
        report(enter("ann"), 0)
        assert flags(enter("bob")) == ["", "", ""]
    assert len(ImageReports(config.folder).standing()) == 1


def test_a_damaged_report_stops_nobody(tmp_path: Path) -> None:
    config = waiting_campaign(tmp_path, groups=1)
    (config.folder / "image_reports/round=1").mkdir(parents=True)
    (config.folder / "image_reports/round=1/page-x.parquet").write_bytes(b"PAR1")
    with served(tmp_path) as enter:
        ann = enter()
        assert flags(ann) == ["", "", ""]
        assert ann.judge([0, 1, 1]).status_code == 200


def test_reports_that_do_not_fit_are_refused_and_kept_nowhere(tmp_path: Path) -> None:
    config = waiting_campaign(tmp_path)
    with served(tmp_path) as enter:
        ann = enter()
        assert [report(ann, 3), report(ann, -1), report(ann, 64), report(ann, 0, "ugly")] == [422] * 4
        assert report(ann, 0, more=1) == report(ann, 0, submission="../../x") == 422
        content = {"ticket": ann.ticket, "image": 0, "reason": "unsafe", "submission": "a" * 32}
        assert ann.http.post("/c/x/report", json=content, headers={"origin": "http://evil.example"}).status_code == 403
        ann.http.cookies.clear()
        assert ann.http.post("/c/x/report", json=content, headers={"origin": ORIGIN}).status_code == 401
    assert ImageReports(config.folder).standing() == {}


# ------------------------------------------------------------------------------------------- undo


@pytest.mark.parametrize(
    ("mode", "values"),
    [("mark_bad", [0, 1, 0]), ("rank", [3, 1, 2]), ("best", [2, 1, 2]), ("pair", [1, -1]), ("pair", [-1, -1])],
)
def test_an_answer_comes_back_with_its_marks_even_after_a_reload_and_a_restart(
    tmp_path: Path, mode: str, values: list[float]
) -> None:
    waiting_campaign(tmp_path, mode=mode)

    def marks(rater: Rater) -> list[float]:
        [text] = re.findall(r'data-before="([^"]*)"', rater.html)
        return [float(value) for value in text.split()]

    with served(tmp_path) as enter:
        ann = enter()
        assert marks(ann) == []
        ann.judge(values)
        assert marks(ann) == []
        ann.undo()
        assert marks(ann) == values == marks(ann.open())
    with served(tmp_path) as enter:
        again = enter()  # the order of the other questions may differ; a rater who goes on finds the marks
        while again.state == "question" and marks(again) != values:
            again.judge(None)
        assert marks(again) == values
        again.judge(values[::-1] if mode != "pair" else [0, 0])
        assert marks(again) == []


def test_the_last_answer_of_a_round_can_be_taken_back_until_the_run_is_told(tmp_path: Path) -> None:
    config = waiting_campaign(tmp_path, groups=1)
    calls: list[tuple[str, int]] = []
    with served(tmp_path, lambda *call: calls.append(call), grace_seconds=1.5) as enter:
        ann = enter()
        ann.judge([0, 1, 1])
        assert ann.state == "done"
        assert ann.undo() == "Taken back."
        assert (ann.state, said(config)) == ("question", [])
        time.sleep(1.6)
        assert calls == [], "the round is not complete"
        ann.open().judge([1, 1, 0])
        undo_of = ann.undo_of
        eventually(lambda: calls == [("x", 1)])
        assert ann.open().undo_of == ""
        ann.undo_of = undo_of
        assert ann.undo() == "The round is done, so this stays."
    assert [entry.answer for entry in said(config)] == [(1, 1, 0)]


def test_a_round_whose_last_answer_is_old_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting_campaign(tmp_path, groups=1)
    calls: list[int] = []
    minutes_ago = time.time_ns() - 120 * 10**9
    with served(tmp_path, lambda *_: calls.append(1), grace_seconds=60.0) as enter, monkeypatch.context() as patch:
        patch.setattr(time, "time_ns", lambda: minutes_ago)
        enter().judge([0, 1, 1])
        eventually(lambda: calls == [1])


# ------------------------------------------------------------------------------------------- what is shown


def test_the_guideline_is_rendered_and_shows_images_only_to_those_let_in(tmp_path: Path) -> None:
    config = waiting_campaign(tmp_path, groups=2, guideline="**Hands** first.\n\n![six](r1-g0-m2)", pixels=4)
    with served(tmp_path) as enter:
        ann, bob = enter("ann"), enter("bob")
        [url] = re.findall(r'<img src="([^"]+)" alt="six"', ann.html)
        assert "<strong>Hands</strong>" in ann.html
        assert ann.http.get(url).content == (config.folder / "images/round=1/r1-g0-m2.png").read_bytes()
        assert url not in bob.html
        assert "r1-g0-m2" not in ann.html
        ann.http.cookies.clear()
        assert ann.http.get(url).status_code == 401
    with served(tmp_path) as enter:  # a page from before a restart
        enter("bob")
        assert enter("ann").http.get(url).status_code == 200


def test_the_first_page_puts_first_what_waits_and_marks_what_is_finished(tmp_path: Path) -> None:
    waiting_campaign(tmp_path, "a-finished", groups=1)
    waiting_campaign(tmp_path, "b-done", groups=1)
    waiting_campaign(tmp_path, "c-waits", groups=2)
    over = tmp_path / "runs/a-finished"
    stage_path(over, 1, "derive").write_text("{}")
    (over / "rounds/round=1").mkdir(parents=True)
    (over / "rounds/round=1/part.parquet").touch()
    with served(tmp_path) as enter:
        ann = enter(campaign="b-done")
        ann.judge([0, 1, 1])
        page = ann.http.get("/").text
        reply = ann.http.get("/waiting").json()
        assert re.findall(r'<span class="sign">([^<]*)<', page) == ["waits for you", "done", "finished"]
        assert re.findall(r'href="/c/([^"]+)"', page) == ["c-waits", "b-done", "a-finished"]
        assert reply["waiting"] == 1
        assert unescape(reply["html"]).strip() in unescape(page)
        assert "<title>(1) d3po label</title>" in page
        assert "http-equiv" not in page, "a page that reloads itself loses the reader's place"
        assert "All rounds are done" in enter(campaign="a-finished").html
        (over / "target.json").write_text('{"goals": {"run": {"last": 3, "rounds": 2}}}')
        assert "Waiting for the next round" in enter(campaign="a-finished").html


@pytest.mark.parametrize(("mode", "unit"), [("pair", "0 of 9 pairs"), ("mark_bad", "0 of 3 groups")])
def test_the_card_counts_what_the_page_counts(tmp_path: Path, mode: str, unit: str) -> None:
    waiting_campaign(tmp_path, mode=mode, enough=0.4)
    with served(tmp_path) as enter:
        ann = enter()
        assert unit in ann.html
        assert unit in ann.http.get("/").text
        while ann.state == "question":
            ann.judge([1, -1] if mode == "pair" else [0, 1, 1])
        [end] = re.findall(r"\d of \d \w+, enough", ann.html)
        assert end in ann.http.get("/").text
