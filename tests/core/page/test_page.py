import contextlib
import json
import re
import stat
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from html import unescape
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi.testclient import TestClient

from d3po_core.config import CampaignConfig
from d3po_core.errors import D3POError
from d3po_core.page.access import RATERS_FILE, Raters
from d3po_core.page.app import create_app
from d3po_core.page.gate import MAX_BODY, Pace
from d3po_core.people.journal import active, export_judgements, read_entries, sampling_of
from d3po_core.people.questions import count_judgements, label_progress
from d3po_core.people.raters import connect_with_journal, rater_report
from d3po_core.store.stages import stage_path
from d3po_core.store.tables import connect, read_rows
from tests.core.people.labelling import bring_in, waiting_campaign

ORIGIN = "http://127.0.0.1:8700"


def nobody(campaign: str, round_number: int) -> None:
    """What is called when a round is done and the test does not care."""


class Rater:
    """A browser without a screen: what a rater's page knows, and what it sends."""

    def __init__(self, data: Path, client: TestClient, name: str, campaign: str = "x") -> None:
        self.name, self.campaign, self.http, self.data = name, campaign, client, data
        client.cookies.set("d3po_label", Raters(data).token(name))

    def open(self) -> "Rater":
        self.see(self.http.get(f"/c/{self.campaign}").text)
        return self

    def see(self, html: str) -> None:
        self.html = html
        fields = dict(re.findall(r'data-(state|ticket|undo|mode|ahead)="([^"]*)"', html))
        self.state, self.ticket, self.undo_of = fields["state"], fields["ticket"], fields["undo"]
        self.ahead = fields["ahead"].split()
        self.images = re.findall(r'<img src="([^"]+)"', html)

    def post(self, where: str, **content: Any) -> httpx.Response:
        content = {"submission": uuid.uuid4().hex} | content
        return self.http.post(f"/c/{self.campaign}/{where}", json=content, headers={"origin": ORIGIN})

    def judge(self, values: list[float] | None = None, **other: Any) -> httpx.Response:
        """Answer (or skip) what is shown, and see what comes next."""
        action = "skip" if values is None else "answer"
        content = {"ticket": self.ticket, "action": action, "values": values or [], "seconds": 1.5} | other
        response = self.post("judge", **content)
        if response.status_code == 200:
            self.see(response.json()["html"])
        return response

    def undo(self) -> str:
        response = self.post("undo", entry=int(self.undo_of))
        self.see(response.json()["html"])
        return str(response.json()["note"])


@contextlib.contextmanager
def served(
    data: Path, on_complete: Callable[[str, int], None] = nobody, **options: Any
) -> Iterator[Callable[..., Rater]]:
    """A page over the data folder; gives a function that lets a rater in."""
    app = create_app(data, on_complete, **({"per_second": 1000.0} | options))
    with TestClient(app, base_url=ORIGIN):

        def enter(name: str = "ann", campaign: str = "x") -> Rater:
            return Rater(data, TestClient(app, base_url=ORIGIN), name, campaign).open()

        yield enter


def said(config: CampaignConfig) -> list[Any]:
    return active(read_entries(config.folder, str(sampling_of(config.folder, 1))))


def eventually(what: Callable[[], bool]) -> None:
    until = time.monotonic() + 10
    while not what():
        assert time.monotonic() < until, "did not happen within ten seconds"
        time.sleep(0.02)


# ------------------------------------------------------------------------------------------- judging


@pytest.mark.parametrize(
    ("mode", "values"), [("pair", [1, -1]), ("mark_bad", [0, 1, 1]), ("best", [2, 1, 2]), ("rank", [3, 1, 2])]
)
def test_a_round_is_judged_to_its_end_in_every_mode(tmp_path: Path, mode: str, values: list[float]) -> None:
    config = waiting_campaign(tmp_path, mode=mode)
    with served(tmp_path) as enter:
        ann = enter()
        for number in range(9 if mode == "pair" else 3):
            assert ann.state == "question", number
            ann.judge(values)
        assert ann.state == "done"
    assert [entry.answer for entry in said(config)] == [tuple(values)] * (9 if mode == "pair" else 3)


def test_the_option_beats_the_configured_mode(tmp_path: Path) -> None:
    waiting_campaign(tmp_path, mode="pair")
    with served(tmp_path, mode="rank") as enter:
        assert 'data-mode="rank"' in enter().html


def test_values_are_kept_with_the_images_that_stood_there(tmp_path: Path) -> None:
    config = waiting_campaign(tmp_path, groups=1, pixels=4)
    with served(tmp_path) as enter:
        ann = enter()
        seen = [ann.http.get(url).content for url in ann.images]
        ann.judge([0, 1, 1])
    [entry] = said(config)
    on_disk = [(config.folder / f"images/round=1/{sample}.png").read_bytes() for sample in entry.shown]
    assert seen == on_disk
    assert (entry.rater, entry.seconds) == ("ann", 1.5)


def test_a_judgement_is_on_disk_when_the_page_is_told(tmp_path: Path) -> None:
    config = waiting_campaign(tmp_path)
    with served(tmp_path) as enter:
        ann = enter()
        for number in range(2):
            assert ann.judge([0, 1, 1]).status_code == 200
            assert len(said(config)) == number + 1


def test_the_same_judgement_sent_again_is_kept_once_and_the_page_goes_on(tmp_path: Path) -> None:
    config = waiting_campaign(tmp_path)
    with served(tmp_path) as enter:
        ann = enter()
        ticket, name = ann.ticket, "a" * 32
        for _ in range(3):
            response = ann.post("judge", ticket=ticket, action="answer", values=[0, 1, 1], submission=name)
            assert response.status_code == 200
            assert response.json()["note"] == ""
            assert ticket not in response.json()["html"]
    assert len(said(config)) == 1


def test_two_windows_on_one_question_keep_the_first_and_say_so(tmp_path: Path) -> None:
    config = waiting_campaign(tmp_path)
    with served(tmp_path) as enter:
        one, two = enter(), enter()
        assert one.ticket == two.ticket
        one.judge([0, 1, 1])
        response = two.judge([1, 1, 0])
        assert "another window" in response.json()["note"]
        assert two.ticket == one.ticket
    assert [entry.answer for entry in said(config)] == [(0, 1, 1)]


def test_raters_at_the_same_time_lose_and_double_nothing(tmp_path: Path) -> None:
    config = waiting_campaign(tmp_path, groups=12, raters_per_group=4, pixels=1)
    with served(tmp_path) as enter:

        def work(name: str) -> None:
            rater = enter(name)
            while rater.state == "question":
                assert rater.judge([0, 1, 1]).status_code == 200

        threads = [threading.Thread(target=work, args=(name,)) for name in ("ann", "bob", "cem", "dan")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(said(config)) == len({(e.rater, e.question_id) for e in said(config)}) == 48


def test_undo_shows_the_same_question_again_and_keeps_the_new_answer(tmp_path: Path) -> None:
    config = waiting_campaign(tmp_path)
    with served(tmp_path) as enter:
        ann = enter()
        images = ann.images
        ann.judge([0, 1, 1])
        assert ann.images != images
        assert ann.undo() == "Taken back."
        assert ann.images == images
        ann.judge([1, 1, 0])
    assert [entry.answer for entry in said(config)] == [(1, 1, 0)]
    assert [e.action for e in read_entries(config.folder, str(sampling_of(config.folder, 1)))] == [
        "answer",
        "undo",
        "answer",
    ]


def test_undo_goes_back_step_by_step_to_the_start(tmp_path: Path) -> None:
    config = waiting_campaign(tmp_path, groups=4)
    with served(tmp_path) as enter:
        ann = enter()
        before = []
        for _ in range(3):
            before.append(ann.images)
            ann.judge([0, 1, 1])
        for images in reversed(before):
            ann.undo()
            assert ann.images == images
        assert ann.undo_of == ""
    assert said(config) == []


def test_undo_pressed_twice_takes_back_once(tmp_path: Path) -> None:
    config = waiting_campaign(tmp_path, groups=4)
    with served(tmp_path) as enter:
        ann = enter()
        ann.judge([0, 1, 1])
        ann.judge([0, 1, 1])
        entry = int(ann.undo_of)
        notes = [ann.post("undo", entry=entry).json()["note"] for _ in range(2)]
    assert notes == ["Taken back.", "That was taken back already."]
    assert len(said(config)) == 1


def test_nobody_takes_back_what_another_said(tmp_path: Path) -> None:
    config = waiting_campaign(tmp_path, groups=4)
    with served(tmp_path) as enter:
        ann, bob = enter("ann"), enter("bob")
        ann.judge([0, 1, 1])
        bob.post("undo", entry=int(ann.undo_of))
    assert len(said(config)) == 1


def test_a_new_server_goes_on_where_the_old_one_was(tmp_path: Path) -> None:
    config = waiting_campaign(tmp_path)
    with served(tmp_path) as enter:
        ann = enter()
        ann.judge([0, 1, 1])
        ticket, images = ann.ticket, ann.images
    with served(tmp_path) as enter:
        again = enter()
        assert (again.ticket, again.images) == (ticket, images)
        assert again.judge([0, 1, 1]).status_code == 200
    assert len(said(config)) == 2


def test_a_page_from_before_a_restart_still_gets_its_images_and_is_still_heard(tmp_path: Path) -> None:
    config = waiting_campaign(tmp_path)
    with served(tmp_path) as enter:
        ann = enter()
        ticket, images, ahead = ann.ticket, ann.images, ann.ahead
    with served(tmp_path) as enter:
        enter("bob")  # the server knows the campaign, not this page
        again = enter("ann")
        again.ticket = ticket
        assert [again.http.get(url).status_code for url in images + ahead] == [200] * (len(images) + len(ahead))
        assert again.judge([0, 1, 1]).status_code == 200
    assert len(said(config)) == 1


def test_two_servers_on_one_folder_agree(tmp_path: Path) -> None:
    config = waiting_campaign(tmp_path, groups=4)
    with served(tmp_path) as enter, served(tmp_path) as enter_other:
        here, there = enter(), enter_other()
        here.judge([0, 1, 1])
        assert "another window" in there.judge([0, 0, 0]).json()["note"]
        assert there.ticket == here.ticket
    assert len(said(config)) == 1


def test_answers_that_do_not_fit_are_refused_for_good(tmp_path: Path) -> None:
    config = waiting_campaign(tmp_path)
    with served(tmp_path) as enter:
        ann = enter()
        for values in ([0, 1], [0, 1, 7], [0, 1, 1, 1]):
            assert ann.judge(values).status_code == 422
        wrong = (
            {"seconds": -1},
            {"submission": "x"},
            {"action": "like"},
            {"more": 1},
            {"values": ["a"]},
            {"ticket": 3},
        )
        for content in wrong:
            assert ann.judge(**({"values": [0, 1, 1]} | content)).status_code == 422
        for ticket in ("", "1.2", "1.x.0.mark_bad:r1-g0", ann.ticket.replace("g", "h"), f"../../{ann.ticket}"):
            assert ann.judge([0, 1, 1], ticket=ticket).status_code == 410
    assert said(config) == []


def test_a_disk_that_fails_is_said_and_the_judgement_is_taken_when_it_works_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from d3po_core.people.journal import Journal

    config = waiting_campaign(tmp_path)
    with served(tmp_path) as enter:
        ann = enter()
        with monkeypatch.context() as patch:
            patch.setattr(Journal, "append", lambda *_: (_ for _ in ()).throw(D3POError("disk full; not kept")))
            response = ann.judge([0, 1, 1])
            assert response.status_code == 503
            assert response.json() == {"error": "disk full; not kept"}
        assert said(config) == []
        assert ann.judge([0, 1, 1]).status_code == 200
    assert len(said(config)) == 1


# ------------------------------------------------------------------------------------------- rounds


def test_the_run_is_told_once_when_the_last_judgement_is_in(tmp_path: Path) -> None:
    waiting_campaign(tmp_path, groups=2)
    calls: list[tuple[str, int]] = []
    told = lambda *call: calls.append(call)  # noqa: E731
    with served(tmp_path, told) as enter:
        ann = enter()
        ann.judge([0, 1, 1])
        time.sleep(0.1)
        assert calls == []
        ann.judge([0, 1, 1])
        assert "Round 1 is done; training goes on" in ann.html
        eventually(lambda: calls == [("x", 1)])
        for _ in range(5):
            ann.open()
    with served(tmp_path, told) as enter:
        enter()
        time.sleep(0.2)
    assert calls == [("x", 1)]


def test_a_call_that_fails_is_shown_and_made_again(tmp_path: Path) -> None:
    waiting_campaign(tmp_path, groups=1)
    calls: list[int] = []
    allowed = threading.Event()

    def told(campaign: str, round_number: int) -> None:
        calls.append(round_number)
        if not allowed.is_set():
            raise RuntimeError("no Prefect <server>")

    with served(tmp_path, told, retry_seconds=0.05) as enter:
        ann = enter()
        ann.judge([0, 1, 1])
        eventually(lambda: len(calls) > 1)
        assert "no Prefect &lt;server&gt;" in ann.open().html
        allowed.set()
        eventually(lambda: "no Prefect" not in ann.open().html)
        number = len(calls)
        time.sleep(0.2)
        assert len(calls) == number


def test_judgements_that_are_brought_in_complete_a_round_too(tmp_path: Path) -> None:
    config = waiting_campaign(tmp_path, groups=2)
    calls: list[tuple[str, int]] = []
    with served(tmp_path, lambda *call: calls.append(call)) as enter:
        ann = enter()
        ann.judge([0, 1, 1])
        bring_in(config, [{"sample_id": f"r1-g{g}-m{m}"} for g in range(2) for m in range(3)])
        eventually(lambda: ann.open().state == "done")
        eventually(lambda: calls == [("x", 1)])


def test_the_next_round_shows_by_itself(tmp_path: Path) -> None:
    config = waiting_campaign(tmp_path, groups=1)
    with served(tmp_path) as enter:
        ann = enter()
        ann.judge([0, 1, 1])
        assert ann.state == "done"
        stage_path(config.folder, 1, "derive").write_text("{}")
        eventually(lambda: ann.open().state == "waiting")
        waiting_campaign(tmp_path, groups=1, round_number=2)
        eventually(lambda: ann.open().state == "question")
        assert "round 2" in ann.html


def test_a_judgement_that_comes_after_the_round_went_on_is_kept(tmp_path: Path) -> None:
    config = waiting_campaign(tmp_path)
    with served(tmp_path) as enter:
        ann = enter()
        stage_path(config.folder, 1, "derive").write_text("{}")
        eventually(lambda: enter("bob").state == "waiting")
        response = ann.judge([0, 1, 1])
        assert response.status_code == 200
        assert "gone on" in response.json()["note"]
    assert len(said(config)) == 1


def test_a_judgement_of_images_that_are_gone_is_refused_for_good(tmp_path: Path) -> None:
    config = waiting_campaign(tmp_path)
    with served(tmp_path) as enter:
        ann = enter()
        stage_path(config.folder, 1, "sample").write_text('{"again": 1}')
        eventually(lambda: ann.judge([0, 1, 1]).status_code == 410)


def test_a_rater_with_nothing_left_waits_for_the_others(tmp_path: Path) -> None:
    waiting_campaign(tmp_path, groups=1, raters_per_group=2)
    with served(tmp_path) as enter:
        ann = enter("ann")
        ann.judge([0, 1, 1])
        assert ann.state == "idle"
        enter("bob").judge([0, 1, 1])
        assert ann.open().state == "done"


def test_a_campaign_of_proxies_asks_nobody(tmp_path: Path) -> None:
    config = waiting_campaign(tmp_path, labeller="proxy")
    calls: list[tuple[str, int]] = []
    with served(tmp_path, lambda *call: calls.append(call)) as enter:
        assert enter().state == "waiting"
        assert "/c/x" not in enter().http.get("/").text
    assert calls == []
    assert not (config.folder / "labels.sqlite").exists()


def test_mixed_waits_for_the_proxies_and_then_asks(tmp_path: Path) -> None:
    config = waiting_campaign(tmp_path, groups=4, labeller="mixed", share=0.5)
    with served(tmp_path) as enter:
        ann = enter()
        assert ann.state == "waiting"
        rows = [{"sample_id": f"r1-g{g}-m{m}", "rater": "p", "rater_kind": "proxy", "kind": "score", "value": float(m)}
                for g in range(4) for m in range(3)]  # fmt: skip
        bring_in(config, rows, name="proxy")
        eventually(lambda: ann.open().state == "question")
        assert "of 2 groups" in ann.html


def test_several_campaigns_are_listed_and_kept_apart(tmp_path: Path) -> None:
    configs = [waiting_campaign(tmp_path, name) for name in ("x", "y")]
    with served(tmp_path) as enter:
        ann = enter(campaign="y")
        assert re.findall(r'href="/c/(\w)"', ann.http.get("/").text) == ["x", "y"]
        ann.judge([0, 1, 1])
    assert [len(said(config)) for config in configs] == [0, 1]


def test_the_priority_decides_what_is_asked_first(tmp_path: Path) -> None:
    config = waiting_campaign(tmp_path, groups=9)

    def last_first(config: CampaignConfig, round_number: int, questions: list[tuple[str, ...]]) -> np.ndarray:
        return np.arange(len(questions))

    with served(tmp_path, priority=last_first) as enter:
        ann = enter()
        while ann.state == "question":
            ann.judge([0, 1, 1])
            time.sleep(0.01)
    # The first three may be set aside before the priorities are there.
    order = [int(entry.question_id[-1]) for entry in said(config)][3:]
    assert order == sorted(order, reverse=True)


def test_a_priority_that_fails_stops_nobody(tmp_path: Path) -> None:
    waiting_campaign(tmp_path, groups=2)
    with served(tmp_path, priority=lambda *_: np.zeros(1)) as enter:
        ann = enter()
        ann.judge([0, 1, 1])
        ann.judge([0, 1, 1])
        assert ann.state == "done"


def test_what_the_page_keeps_is_exported(tmp_path: Path) -> None:
    config = waiting_campaign(tmp_path, groups=2)
    with served(tmp_path) as enter:
        ann = enter()
        ann.judge([0, 1, 1])
        ann.judge(None)
    [path] = export_judgements(config.folder, 1)
    assert sorted(str(row["value"]) for row in read_rows(path)) == ["0.0", "1.0", "1.0", "None", "None", "None"]


@pytest.mark.parametrize(("mode", "values"), [("mark_bad", [0, 1, 1, 1, 1, 1, 1]), ("pair", [1, -1])])
def test_page_raters_and_records_count_the_same_judgements(tmp_path: Path, mode: str, values: list[float]) -> None:
    size = len(values)
    config = waiting_campaign(tmp_path, groups=24, size=size, pixels=1, mode=mode)
    with served(tmp_path) as enter:
        ann = enter()
        for number in range(24):
            ann.judge(values)
            if number in (4, 9):
                ann.undo()
                ann.judge(values)
            if number == 14:
                ann.undo()
                ann.judge(None)  # comes back at the end
        with connect_with_journal(config.folder) as connection:  # while the round waits, before anything is exported
            [waiting] = rater_report(connection, 0.6).raters
            assert (waiting.judgements, waiting.skips, waiting.taken_back, waiting.groups) == (23, 0, 3, 23)
        assert "you 23" in ann.html
        ann.judge(values)
        assert "24 judgements by 1" in ann.html
    assert label_progress(config, 1).judgements == count_judgements(config.folder, 1) == 24
    export_judgements(config.folder, 1)
    for reading in (connect, connect_with_journal):  # nothing is counted twice once it is exported
        with reading(config.folder) as connection:
            [found] = rater_report(connection, 0.6).raters
            assert (found.judgements, found.skips, found.taken_back, found.groups) == (24, 0, 3, 24)


# ------------------------------------------------------------------------------------------- what raters see


def test_prompts_are_escaped(tmp_path: Path) -> None:
    waiting_campaign(tmp_path, guideline="<script>alert(1)</script>")
    with served(tmp_path) as enter:
        html = enter().html
    assert "<b>" not in re.search(r"<h1.*?</h1>", html, re.S)[0]  # type: ignore[index]
    assert re.search(r"prompt <b>\d</b> & co", unescape(html))
    assert "<script>alert" not in html


def test_nothing_on_the_page_says_which_image_is_which(tmp_path: Path) -> None:
    waiting_campaign(tmp_path, groups=6)
    with served(tmp_path) as enter:
        ann, bob = enter("ann"), enter("bob")
        assert not re.search(r"-m\d|checkpoint|images/|\.png", ann.html)
        assert len(ann.ahead) == 6
        assert all(re.fullmatch(r"/i/[0-9a-f]{32}", url) for url in ann.images + ann.ahead)
        assert not set(ann.images + ann.ahead) & set(bob.images + bob.ahead)
        headers = ann.http.get(ann.images[0]).headers
        assert not {"etag", "last-modified"} & set(headers)


def test_a_question_with_a_known_answer_looks_like_any_other(tmp_path: Path) -> None:
    config = waiting_campaign(tmp_path, groups=1)
    with served(tmp_path) as enter:
        plain = enter().html
        bring_in(config, [{"sample_id": f"r1-g0-m{m}", "rater_kind": "gold"} for m in range(3)])
        time.sleep(0.6)
        assert enter().html == plain


def test_images_that_come_next_can_be_fetched_before(tmp_path: Path) -> None:
    waiting_campaign(tmp_path, groups=4)
    with served(tmp_path) as enter:
        ann = enter()
        ahead = ann.ahead
        ann.judge([0, 1, 1])
        assert ann.images == ahead[:3]


def test_every_control_has_a_name_and_a_key(tmp_path: Path) -> None:
    waiting_campaign(tmp_path)
    with served(tmp_path) as enter:
        buttons = re.findall(r"<button.*?</button>", enter().html, re.S)
    assert buttons
    for button in buttons:
        assert "aria-label=" in button or re.sub(r"<[^>]*>", "", button).strip(), button


# ------------------------------------------------------------------------------------------- safety


def test_without_a_token_there_is_nothing_to_see(tmp_path: Path) -> None:
    config = waiting_campaign(tmp_path)
    with served(tmp_path) as enter:
        ann = enter()
        stranger = TestClient(ann.http.app, base_url=ORIGIN)
        stranger.cookies.set("d3po_label", "guess")
        for url in ("/", "/c/x", "/c/x/next", ann.images[0]):
            assert stranger.get(url).status_code == 401
        for where in ("judge", "undo"):
            content = {"ticket": ann.ticket, "submission": "a" * 32, "action": "skip"}
            assert stranger.post(f"/c/x/{where}", json=content, headers={"origin": ORIGIN}).status_code in (401, 422)
    assert said(config) == []


def test_a_link_turns_into_a_strict_cookie(tmp_path: Path) -> None:
    waiting_campaign(tmp_path)
    token = Raters(tmp_path).token("ann")
    client = TestClient(create_app(tmp_path, nobody), base_url=ORIGIN)
    assert client.get("/enter", params={"key": token[:-1]}).status_code == 401
    response = client.get("/enter", params={"key": token})
    cookie = response.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert client.get("/").status_code == 200


def test_tokens_are_private_kept_and_different(tmp_path: Path) -> None:
    raters = Raters(tmp_path)
    tokens = [raters.token(name) for name in ("ann", "bob", "ann")]
    assert tokens[0] == tokens[2] != tokens[1]
    assert len(tokens[0]) >= 43
    path = tmp_path / RATERS_FILE
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)
    with pytest.raises(D3POError, match="chmod 600"):
        Raters(tmp_path).names()


def test_a_rater_who_is_added_while_the_page_runs_can_enter(tmp_path: Path) -> None:
    waiting_campaign(tmp_path)
    with served(tmp_path) as enter:
        enter("ann")
        assert enter("zoe").state == "question"


@pytest.mark.parametrize("name", ["", "../x", "a/b", "a  b", " a", "a\nb", "x" * 101])
def test_a_name_with_slashes_or_odd_spaces_is_no_raters(tmp_path: Path, name: str) -> None:
    with pytest.raises(D3POError, match="expected up to 100"):
        Raters(tmp_path).token(name)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"origin": "http://evil.example"}, 403), ({"origin": "null"}, 403), ({"origin": ""}, 403),
        ({"origin": "http://127.0.0.1:1"}, 403), ({"origin": ORIGIN, "host": "evil.example"}, 400),
        ({"origin": "http://evil.example", "host": "evil.example"}, 400),
        ({"origin": ORIGIN, "content-type": "text/plain"}, 415),
        ({"origin": ORIGIN, "content-length": "99999999"}, 413),
    ],
)  # fmt: skip
def test_requests_from_elsewhere_change_nothing(tmp_path: Path, headers: dict[str, str], status: int) -> None:
    config = waiting_campaign(tmp_path)
    with served(tmp_path) as enter:
        ann = enter()
        content = json.dumps({"ticket": ann.ticket, "submission": "a" * 32, "action": "skip"})
        usual = {"content-type": "application/json"}
        assert ann.http.post("/c/x/judge", content=content, headers=usual | headers).status_code == status
        if headers["origin"] != ORIGIN:
            unsaid = {"content-type": "application/json"}
            assert ann.http.post("/c/x/judge", content=content, headers=unsaid).status_code == 403
    assert said(config) == []


def test_a_rebound_name_sees_nothing_and_a_named_one_does(tmp_path: Path) -> None:
    waiting_campaign(tmp_path)
    with served(tmp_path, hosts=("127.0.0.1", "lab.example")) as enter:
        client = enter().http
        for host, status in {"evil.example": 400, "": 400, "[": 400, "lab.example:80": 200, "LAB.example": 200}.items():
            assert client.get("/c/x", headers={"host": host}).status_code == status, host


def test_bodies_are_limited_even_when_they_do_not_say_their_size(tmp_path: Path) -> None:
    waiting_campaign(tmp_path)
    with served(tmp_path) as enter:
        ann = enter()
        headers = {"origin": ORIGIN, "content-type": "application/json"}
        pieces = iter([b" " * 1000] * (MAX_BODY // 1000 + 1))
        assert ann.http.post("/c/x/judge", content=pieces, headers=headers).status_code == 413


def test_a_rater_who_sends_too_much_is_slowed_down_and_loses_nothing(tmp_path: Path) -> None:
    config = waiting_campaign(tmp_path, groups=30, pixels=1)
    with served(tmp_path, per_second=2.0) as enter:
        ann = enter()
        statuses = [ann.judge([0, 1, 1]).status_code for _ in range(10)]
    assert statuses.count(429) >= 3
    assert len(said(config)) == statuses.count(200) >= 6


def test_a_pace_refills(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    pace = Pace(per_second=2, burst=3)
    assert [pace.allows("a") for _ in range(4)] == [True, True, True, False]
    assert pace.allows("b")
    now[0] = 0.6
    assert [pace.allows("a") for _ in range(2)] == [True, False]


@pytest.mark.parametrize(
    "url",
    ["/c/%2e%2e%2fx", "/c/x%2f..", "/i/..%2f..%2fcampaign.json", "/i/images", "/static/..%2fapp.py",
     "/static/../app.py", "/static/templates", "/c/x/labels.sqlite", "/docs", "/openapi.json"],
)  # fmt: skip
def test_no_path_of_a_request_reaches_the_disk(tmp_path: Path, url: str) -> None:
    waiting_campaign(tmp_path)
    with served(tmp_path) as enter:
        assert enter().http.get(url).status_code == 404


def test_every_answer_binds_the_browser(tmp_path: Path) -> None:
    waiting_campaign(tmp_path)
    with served(tmp_path) as enter:
        ann = enter()
        for url in ("/", "/c/x", "/c/none", ann.images[0], "/static/label.js", "/health"):
            headers = ann.http.get(url).headers
            policy = headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert headers["x-content-type-options"] == "nosniff"
        assert not re.search(r"<script(?![^>]*src=)|\son\w+=|style=", ann.http.get("/c/x").text)


def test_everything_comes_from_the_page_itself() -> None:
    folder = Path(create_app.__code__.co_filename).parent
    for path in [*folder.glob("templates/*"), *folder.glob("static/*")]:
        found = set(re.findall(r"https?://[^\s\"')]+", path.read_text()))
        assert found <= {"http://www.w3.org/2000/svg"}, path.name
