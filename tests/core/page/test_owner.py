"""The owner's pages over HTTP: who gets in, what they show, what they change, and whom raters' pages admit."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from d3po_core.page.access import RATERS_FILE, Raters
from d3po_core.page.app import create_app
from d3po_core.people.invitations import FILE, invite, read_invitations
from d3po_core.people.reports import ImageReports, Reason
from tests.core.page.test_page import ORIGIN, Rater, nobody, said
from tests.core.people.labelling import waiting_campaign

PAGES = ("/owner", "/owner/next", "/owner/c/x", "/owner/c/x/next")
ACTIONS: dict[str, dict[str, Any]] = {
    "invite": {"rater": "bob"}, "link": {"rater": "ann"}, "revoke": {"rater": "ann"},
    "quota": {"rater": "ann", "quota": 3}, "assignment": {"assignment": "split"},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _look_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("d3po_core.page.desk.LOOK_SECONDS", 0.0)


class House:
    """A page over a data folder; ``owner`` is the owner's browser, ``enter`` lets a rater in."""

    def __init__(self, data: Path, app: Any) -> None:
        self.data, self.app = data, app
        self.owner = TestClient(app, base_url=ORIGIN)
        self.owner.cookies.set("d3po_owner", Raters(data).owner_token())

    def browser(self, **cookies: str) -> TestClient:
        client = TestClient(self.app, base_url=ORIGIN)
        for name, value in cookies.items():
            client.cookies.set(name, value)
        return client

    def enter(self, name: str, campaign: str = "x") -> Rater:
        return Rater(self.data, self.browser(), name, campaign).open()

    def act(self, action: str, client: TestClient | None = None, campaign: str = "x", **content: Any) -> httpx.Response:
        url = f"/owner/c/{campaign}/{action}"
        return (client or self.owner).post(url, json=content, headers={"origin": ORIGIN})

    def row(self, rater: str) -> list[str]:
        """A rater's cells on the owner's page, without actions."""
        html = self.owner.get("/owner/c/x/next").json()["html"]
        row = re.search(rf'<tr role="row"[^>]*>\s*<th[^>]*><span class="name">{rater}</span>.*?</tr>', html, re.S)
        assert row is not None, rater
        cells = re.findall(r'data-head="[^"]+">(.*?)</td>', row[0], re.S)
        return [" ".join(re.sub(r"<[^>]+>", "", cell).split()) for cell in cells]


@contextlib.contextmanager
def house(data: Path) -> Iterator[House]:
    app = create_app(data, nobody, per_second=1000.0)
    with TestClient(app, base_url=ORIGIN):
        yield House(data, app)


def test_only_the_owners_link_opens_the_owners_pages(tmp_path: Path) -> None:
    waiting_campaign(tmp_path, pixels=1)
    token = Raters(tmp_path).token("ann")
    with house(tmp_path) as here:
        before = (tmp_path / RATERS_FILE).read_bytes()
        for client in (here.browser(), here.browser(d3po_label=token), here.browser(d3po_owner=token)):
            assert [client.get(url).status_code for url in PAGES] == [401] * len(PAGES)
            assert client.get("/owner/enter", params={"key": token}).status_code == 401
            for action, content in ACTIONS.items():
                assert here.act(action, client, **content).status_code == 401, action
        assert (tmp_path / RATERS_FILE).read_bytes() == before
        assert not (tmp_path / "runs/x" / FILE).exists()


def test_the_owners_token_is_no_raters_and_its_cookie_stays_with_the_owners_pages(tmp_path: Path) -> None:
    waiting_campaign(tmp_path, pixels=1)
    token = Raters(tmp_path).owner_token()
    with house(tmp_path) as here:
        assert here.browser().get("/enter", params={"key": token}).status_code == 401
        assert here.browser(d3po_label=token).get("/c/x").status_code == 401
        client = here.browser()
        cookie = client.get("/owner/enter", params={"key": token}).headers["set-cookie"].lower()
        assert {"httponly", "samesite=strict", "path=/owner"} <= set(cookie.replace(" ", "").split(";"))
        assert client.get("/owner").status_code == 200
        assert Raters(tmp_path).owner_token() == token


def test_wrong_owner_links_are_slowed_down(tmp_path: Path) -> None:
    with house(tmp_path) as here:
        statuses = {here.browser().get("/owner/enter", params={"key": f"guess{n}"}).status_code for n in range(40)}
    assert statuses == {401, 429}


@pytest.mark.parametrize("origin", ["http://evil.example", "null", ""])
def test_another_sites_page_cannot_act_as_the_owner(tmp_path: Path, origin: str) -> None:
    waiting_campaign(tmp_path, pixels=1)
    with house(tmp_path) as here:
        for action, content in ACTIONS.items():
            response = here.owner.post(f"/owner/c/x/{action}", json=content, headers={"origin": origin})
            assert response.status_code == 403
        assert not (tmp_path / "runs/x" / FILE).exists()


@pytest.mark.parametrize(
    ("action", "content", "status"),
    [
        ("invite", {"rater": "a/b"}, 422), ("invite", {"rater": ""}, 422),
        ("invite", {"rater": "ann", "quota": -1}, 422),
        ("invite", {"rater": "ann", "quota": True}, 422), ("invite", {"rater": "a" * 500}, 422),
        ("invite", {"rater": "ann", "more": 1}, 422), ("quota", {"rater": "zoe", "quota": 3}, 422),
        ("link", {"rater": "zoe"}, 422), ("assignment", {"assignment": "split"}, 422),
        ("assignment", {"assignment": "odd"}, 422), ("revoke", {"rater": "zoe"}, 422),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_in_a_line(tmp_path: Path, action: str, content: Any, status: int) -> None:
    waiting_campaign(tmp_path, pixels=1)
    with house(tmp_path) as here:
        response = here.act(action, **content)
        assert response.status_code == status
        assert "\n" not in response.json()["error"]
        assert str(tmp_path) not in response.json()["error"]
        assert Raters(tmp_path).names() == []


def test_there_is_nothing_at_other_names(tmp_path: Path) -> None:
    waiting_campaign(tmp_path, pixels=1)
    with house(tmp_path) as here:
        for name in ("y", "..%2fx", "x~0"):
            assert here.owner.get(f"/owner/c/{name}").status_code == 404
            assert here.act("invite", campaign=name, rater="ann").status_code == 404


def test_an_invited_rater_judges_and_the_owner_sees_it_grow(tmp_path: Path) -> None:
    config = waiting_campaign(tmp_path, pixels=1, groups=4)
    with house(tmp_path) as here:
        reply = here.act("invite", rater="ann", quota=3).json()
        assert reply["link"] in reply["text"]
        assert "up to 3 groups" in reply["text"]
        browser = here.browser()
        assert browser.get(reply["link"].removeprefix(ORIGIN)).status_code == 200
        ann = here.enter("ann")
        assert here.row("ann")[:3] == ["0", "3", "3"]
        ann.judge([0, 1, 1])
        assert here.row("ann")[:6] == ["1", "3", "2", "1", "0", "0"]
        ann.judge(None)
        ann.undo()
        ann.judge([0, 1, 1])
        assert here.row("ann")[:6] == ["2", "3", "1", "2", "0", "1"]
        html = here.owner.get("/owner/c/x").text
        assert "2 of 4" in html
        assert "Round 1 waits for people" in html
    assert len(said(config)) == 2


def test_a_revoked_link_dies_at_once_and_the_answers_stay(tmp_path: Path) -> None:
    config = waiting_campaign(tmp_path, pixels=1, groups=4)
    with house(tmp_path) as here:
        link = here.act("invite", rater="ann").json()["link"].removeprefix(ORIGIN)
        ann = here.enter("ann")
        ann.judge([0, 1, 1])
        assert here.act("revoke", rater="ann").status_code == 200
        assert ann.judge([0, 1, 1]).status_code == 401
        assert ann.http.get("/c/x").status_code == 401
        assert here.browser().get(link).status_code == 401
        html = here.owner.get("/owner/c/x").text
        assert "revoked" in html
        assert here.row("ann")[:4] == ["1", "\u2013", "0", "1"]
        assert len(said(config)) == 1
        again = here.act("invite", rater="ann").json()["link"].removeprefix(ORIGIN)
        assert again != link
        assert here.browser().get(link).status_code == 401
        assert here.browser().get(again).status_code == 200


def test_raters_see_only_campaigns_that_they_may_judge(tmp_path: Path) -> None:
    for name in ("x", "other", "free"):
        waiting_campaign(tmp_path, name, pixels=1)
    with house(tmp_path) as here:
        open_rater = here.enter("olga", "free")
        here.act("invite", rater="ann")
        here.act("invite", campaign="other", rater="bob")
        shown = {}
        for name, campaign in (("ann", "x"), ("bob", "other"), ("olga", "free")):
            rater = here.enter(name, campaign)
            shown[name] = set(re.findall(r'href="/c/(\w+)"', rater.http.get("/").text))
        assert shown == {"ann": {"x"}, "bob": {"other"}, "olga": {"free"}}
        ann, bob = here.enter("ann"), here.enter("bob", "other")
        for url in ("/c/other", "/c/other/next", "/c/free"):
            assert ann.http.get(url).status_code == 404, url
        bob.campaign = "x"
        assert bob.judge([0, 1, 1]).status_code == 404
        assert open_rater.http.get("/c/x").status_code == 404


def test_an_images_address_shows_it_to_its_rater_only(tmp_path: Path) -> None:
    waiting_campaign(tmp_path, pixels=1)
    with house(tmp_path) as here:
        here.act("invite", rater="ann")
        ann, other = here.enter("ann"), here.browser(d3po_label=Raters(tmp_path).token("olga"))
        assert ann.http.get(ann.images[0]).status_code == 200
        assert other.get(ann.images[0]).status_code == 404


def test_a_rater_without_a_valid_link_is_told_what_a_rater_can_do(tmp_path: Path) -> None:
    waiting_campaign(tmp_path, pixels=1)
    with house(tmp_path) as here:
        link = here.act("invite", rater="ann").json()["link"].removeprefix(ORIGIN)
        ann = here.enter("ann")
        here.act("revoke", rater="ann")
        for text in (ann.judge([0, 1, 1]).text, ann.http.get("/c/x").text, here.browser().get(link).text):
            assert "ask whoever sent it for a new one" in text.lower()
            assert "d3po label" not in text.replace("</title>", "").split("<body", 1)[-1]


def test_groups_are_dealt_out_on_request(tmp_path: Path) -> None:
    waiting_campaign(tmp_path, pixels=1, groups=6)
    with house(tmp_path) as here:
        for name in ("ann", "bob"):
            here.act("invite", rater=name)
        here.act("assignment", assignment="split")
        here.enter("ann")  # the page deals when it looks at the round
        assert [here.row(name)[:3] for name in ("ann", "bob")] == [["0", "\u2013", "3"]] * 2
        assert read_invitations(tmp_path / "runs/x").assignment == "split"


def test_quotas_that_are_too_small_are_said(tmp_path: Path) -> None:
    waiting_campaign(tmp_path, pixels=1, groups=6)
    with house(tmp_path) as here:
        here.act("invite", rater="ann", quota=4)
        assert "2 groups lack raters" in here.owner.get("/owner/c/x").text
        here.act("quota", rater="ann", quota=0)
        assert "lack raters" not in here.owner.get("/owner/c/x").text


def test_a_damaged_file_of_invitations_is_shown_and_lets_nobody_in(tmp_path: Path) -> None:
    waiting_campaign(tmp_path, pixels=1)
    waiting_campaign(tmp_path, "y", pixels=1)
    invite(tmp_path / "runs/x", "ann")
    with house(tmp_path) as here:
        ann = here.enter("ann")
        (tmp_path / "runs/x" / FILE).write_text("{")
        assert ann.judge([0, 1, 1]).status_code == 503
        assert "/c/x" not in ann.http.get("/").text
        assert "cannot be read" in here.owner.get("/owner/c/x").text
        listed = here.owner.get("/owner")
        assert "cannot be read" in listed.text
        assert "/owner/c/y" in listed.text
        assert str(tmp_path) not in listed.text


def test_names_are_text_and_the_page_binds_the_browser(tmp_path: Path) -> None:
    waiting_campaign(tmp_path, pixels=1)
    name = "<b>'\"&"
    with house(tmp_path) as here:
        assert here.act("invite", rater=name).status_code == 200
        response = here.owner.get("/owner/c/x")
        assert name not in response.text
        assert "&lt;b&gt;" in response.text
        assert "default-src 'none'" in response.headers["content-security-policy"]
        assert not re.search(r"<script(?![^>]*src=)|\son\w+=|style=", response.text)


def test_no_link_is_in_what_the_page_polls(tmp_path: Path) -> None:
    waiting_campaign(tmp_path, pixels=1)
    with house(tmp_path) as here:
        token = here.act("invite", rater="ann").json()["link"].rpartition("=")[2]
        assert all(token not in here.owner.get(url).text for url in PAGES)


def test_reported_images_are_listed_until_the_report_is_withdrawn(tmp_path: Path) -> None:
    reports = ImageReports(waiting_campaign(tmp_path, pixels=1).folder)
    told: list[tuple[str, str, Reason]] = [
        ("ann", "r1-g0-m1", "unsafe"), ("bob", "r1-g2-m0", "broken"), ("ann", "r1-g1-m2", "broken"),
        ("ann", "r1-g1-m2", "withdrawn"),
    ]  # fmt: skip
    for number, (rater, image, reason) in enumerate(told):
        reports.add(rater, image, f"images/round=1/{image}.png", reason, f"{number:032x}")
    with house(tmp_path) as here:
        html = here.owner.get("/owner/c/x").text
    assert re.findall(r"<li><b>([\w-]+)</b>: (.*?)</li>", html) == [
        ("r1-g0-m1", "unsafe (ann)"),
        ("r1-g2-m0", "broken (bob)"),
    ]
