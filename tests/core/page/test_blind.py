"""Blind comparisons at the labelling page, beside rounds that wait, and without any."""

import re
import time
from pathlib import Path
from typing import Any

import pytest

from d3po_core.people.blind import BlindComparison, begin_comparison, collect_comparisons
from d3po_core.people.human_win_rate import human_win_rates
from d3po_core.people.journal import active, read_entries
from d3po_core.people.questions import label_progress
from d3po_core.store.tables import partition
from tests.core.evaluation.compared import evaluated
from tests.core.page.test_page import Rater, eventually, served
from tests.core.people.labelling import waiting_campaign


def begun(tmp_path: Path, pairs: int = 6, raters: int = 1, **options: Any) -> tuple[Path, BlindComparison, str]:
    """A campaign of proxies, for which no round waits; its comparison of round 1 with the base, and the page's name."""
    campaign = evaluated(tmp_path / "runs" / "x", **options)
    comparison = begin_comparison(campaign, 1, 0, pairs, raters).comparison
    return campaign, comparison, f"x~{comparison.id}"


def said(campaign: Path, comparison: BlindComparison) -> list[Any]:
    return active(read_entries(campaign, comparison.id))


def prefer(rater: Rater, campaign: Path, comparison: BlindComparison) -> None:
    """Choose the round's image, which only somebody can who has the files."""
    number = int(rater.ticket.rpartition(":")[2])
    shown = [rater.http.get(url).content for url in rater.images]
    own = shown.index((campaign / comparison.pairs[number].image_path).read_bytes())
    rater.judge([1, -1] if own == 0 else [-1, 1])


def test_a_comparison_is_judged_to_its_end_without_a_round_that_waits(tmp_path: Path) -> None:
    campaign, comparison, name = begun(tmp_path)
    told: list[tuple[str, int]] = []
    with served(tmp_path, on_compared=lambda *call: told.append(call)) as enter:
        ann = enter(campaign=name)
        for number in range(6):
            assert ann.state == "question"
            prefer(ann, campaign, comparison)
            assert len(said(campaign, comparison)) == number + 1
        assert ann.state == "done"
        assert "Done: every pair is judged" in ann.html
        eventually(lambda: told == [("x", 1)])
    collect_comparisons(campaign)
    (rate,) = human_win_rates(campaign)
    assert (rate.round, rate.against, rate.num_pairs, rate.win_rate.mean) == (1, 0, 6, 1.0)


def test_the_start_page_lists_a_comparison_until_it_is_done(tmp_path: Path) -> None:
    _, comparison, name = begun(tmp_path, pairs=1)
    with served(tmp_path) as enter:
        ann = enter(campaign=name)
        page = ann.http.get("/").text
        assert re.findall(r'href="/c/([^"]+)"', page) == [name]
        assert f"blind comparison {comparison.id[:4]} · 0 of 1 pairs" in page
        ann.judge([0, 0])
        assert re.findall(r'href="/c/([^"]+)"', ann.http.get("/").text) == []


def test_nothing_says_which_image_is_whose_nor_which_rounds_are_compared(tmp_path: Path) -> None:
    _, comparison, name = begun(tmp_path, pairs=24)
    with served(tmp_path) as enter:
        ann, bob = enter("ann", name), enter("bob", name)
        for text in (ann.html, ann.http.get(f"/c/{name}/next").text, ann.http.get("/").text):
            assert not re.search(r"r[01]-e\d|round=|round \d|checkpoint|images/|\.png|base model", text)
        assert ann.ticket == f"0.{comparison.id}.0.{ann.ticket.rpartition('.')[2]}"
        assert re.fullmatch(r"pair:\d+", ann.ticket.rpartition(".")[2])
        urls = ann.images + ann.ahead
        assert all(re.fullmatch(r"/i/[0-9a-f]{32}", url) for url in urls)
        assert not set(urls) & set(bob.images + bob.ahead)
        answers = [ann.http.get(url).headers for url in ann.images]
        assert {key for headers in answers for key in headers} == set(answers[0])
        assert not {"etag", "last-modified"} & set(answers[0])


def test_the_same_base_image_has_another_address_in_another_comparison(tmp_path: Path) -> None:
    campaign, _, name = begun(tmp_path, pairs=1, prompts=1, seeds=1)
    other = begin_comparison(campaign, 2, 0, 1).comparison
    with served(tmp_path) as enter:
        one, two = enter(campaign=name), enter(campaign=f"x~{other.id}")
        contents = [{rater.http.get(url).content for url in rater.images} for rater in (one, two)]
        assert len(contents[0] & contents[1]) == 1
        assert not set(one.images) & set(two.images)


def test_tie_skip_and_undo_work_and_even_the_last_answer_can_be_taken_back(tmp_path: Path) -> None:
    campaign, comparison, name = begun(tmp_path, pairs=2)
    told: list[int] = []
    with served(tmp_path, on_compared=lambda _, number: told.append(number)) as enter:
        ann = enter(campaign=name)
        ann.judge(None)
        ann.judge([0, 0])
        assert "you skipped this one before" in ann.html
        ann.judge([1, -1])
        assert ann.state == "done"
        eventually(lambda: told == [1])
        assert ann.undo() == "Taken back."
        assert ann.state == "question"
        ann.judge([-1, 1])
        assert ann.state == "done"
        eventually(lambda: told == [1, 1])
    assert [entry.answer for entry in said(campaign, comparison)] == [None, (0, 0), (-1, 1)]


def test_several_raters_are_asked_about_each_pair(tmp_path: Path) -> None:
    campaign, comparison, name = begun(tmp_path, pairs=2, raters=2)
    with served(tmp_path) as enter:
        ann, bob = enter("ann", name), enter("bob", name)
        for rater in (ann, bob):
            rater.judge([1, -1])
            rater.judge([1, -1])
        assert ann.state == "idle"
        assert "every pair you can" in ann.html
        assert ann.open().state == bob.state == "done"
    assert len(said(campaign, comparison)) == 4


def test_a_round_that_waits_and_a_comparison_do_not_know_of_each_other(tmp_path: Path) -> None:
    campaign, comparison, name = begun(tmp_path, pairs=2)
    config = waiting_campaign(tmp_path, groups=2, round_number=3)
    woken: list[tuple[str, int]] = []
    told: list[tuple[str, int]] = []
    with served(
        tmp_path, lambda *call: woken.append(call), on_compared=lambda *call: told.append(call), mode="mark_bad"
    ) as enter:
        ann, blind = enter(), enter(campaign=name)
        assert "round 3" in ann.html
        assert re.findall(r'href="/c/([^"]+)"', ann.http.get("/").text) == ["x", name]
        before = ann.html
        blind.judge([1, -1])
        blind.judge([0, 0])
        assert blind.state == "done"
        eventually(lambda: told == [("x", 1)])
        assert ann.open().html == before
        assert label_progress(config, 3).judgements == 0
        ann.judge([0, 1, 1])
        time.sleep(0.1)
        assert woken == []
        ann.judge([0, 1, 1])
        eventually(lambda: woken == [("x", 3)])
    assert len(told) == 1
    assert len(said(campaign, comparison)) == 2
    collect_comparisons(campaign)
    assert not list(partition(campaign, "judgements", 1).glob("page-*"))


def test_pairs_that_are_added_while_the_page_runs_are_asked(tmp_path: Path) -> None:
    campaign, comparison, name = begun(tmp_path, pairs=1)
    with served(tmp_path) as enter:
        ann = enter(campaign=name)
        ann.judge([1, -1])
        assert ann.state == "done"
        begin_comparison(campaign, 1, 0, 2)
        eventually(lambda: ann.open().state == "question")
        ann.judge([1, -1])
    assert len(said(campaign, comparison)) == 2


def test_a_comparison_that_is_begun_while_the_page_runs_shows_by_itself(tmp_path: Path) -> None:
    campaign = evaluated(tmp_path / "runs" / "x")
    with served(tmp_path) as enter:
        ann = enter()
        comparison = begin_comparison(campaign, 2, 1, 1).comparison
        assert f"/c/x~{comparison.id}" in ann.http.get("/").text


def test_pairs_whose_images_are_removed_are_no_longer_asked_and_none_left_is_said(tmp_path: Path) -> None:
    campaign, comparison, name = begun(tmp_path, pairs=3)
    with served(tmp_path) as enter:
        ann = enter(campaign=name)
        shown = int(ann.ticket.rpartition(":")[2])
        (campaign / comparison.pairs[shown].image_path).unlink()
        time.sleep(0.6)
        # It was looked at before, so the answer counts.
        assert ann.judge([1, -1]).status_code == 200
        assert len(said(campaign, comparison)) == 1
        assert "of 2 pairs" in ann.open().html
        for pair in comparison.pairs:
            (campaign / pair.against_path).unlink(missing_ok=True)
        eventually(lambda: ann.open().state == "waiting")
        assert "the images of this comparison are no longer on disk" in ann.html
        assert "the images of this comparison are no longer on disk" in ann.http.get("/").text


def test_a_page_from_before_a_restart_still_gets_its_images_and_is_still_heard(tmp_path: Path) -> None:
    campaign, comparison, name = begun(tmp_path)
    with served(tmp_path) as enter:
        ann = enter(campaign=name)
        ticket, images = ann.ticket, ann.images
    with served(tmp_path) as enter:
        again = enter("ann", name)
        assert (again.ticket, again.images) == (ticket, images)
        assert again.judge([1, -1]).status_code == 200
    with served(tmp_path) as enter:
        bob = enter("bob", "x")  # the server has not been asked for the comparison yet
        assert bob.state == "waiting"
        again = Rater(tmp_path, bob.http, "ann", name)
        eventually(lambda: all(again.http.get(url).status_code == 200 for url in images))
    assert len(said(campaign, comparison)) == 1


def test_answers_that_do_not_fit_and_tickets_of_others_are_refused(tmp_path: Path) -> None:
    campaign, comparison, name = begun(tmp_path)
    config = waiting_campaign(tmp_path, name="y", mode="pair")
    with served(tmp_path) as enter:
        ann, other = enter(campaign=name), enter(campaign="y")
        for values in ([1, 1], [1], [0, 1, -1]):
            assert ann.judge(values).status_code == 422
        for ticket in (other.ticket, ann.ticket.replace("pair:", "rank:"), f"{ann.ticket}99", "0.x.0.pair:0"):
            assert ann.judge([1, -1], ticket=ticket).status_code == 410
        assert other.judge([1, -1], ticket=ann.ticket).status_code == 410
        assert ann.http.get("/c/x~0123456789abcdef").status_code == 404
    assert said(campaign, comparison) == []
    assert label_progress(config, 1).judgements == 0


@pytest.mark.parametrize("broken", ["", "{}", '{"id": "a"}'])
def test_a_comparison_that_cannot_be_read_stops_no_round(tmp_path: Path, broken: str) -> None:
    campaign, _, _ = begun(tmp_path)
    waiting_campaign(tmp_path, groups=1, round_number=3)
    (campaign / "comparisons" / "1-0.json").write_text(broken)
    with served(tmp_path) as enter:
        ann = enter()
        assert ann.state == "question"
        assert ann.http.get("/").status_code == 200
        assert ann.judge([0, 1, 1]).status_code == 200
