"""The owner's page in a real browser: inviting, watching answers arrive without a reload, quota and revoking."""

from typing import Any

import pytest

from d3po_core.page.access import Raters
from d3po_core.people.invitations import read_invitations
from tests.core.people.labelling import waiting_campaign
from tests.page.test_in_chromium import CHROMIUM, Served, browser, enter, key, said, served

__all__ = ["browser", "served"]
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH: apt-get install chromium")


def owner(browser: Any, served: Served) -> Any:
    """The owner's browser on a campaign, with what the browser complained about."""
    page = browser.new_context(viewport={"width": 1280, "height": 800}).new_page()
    page.complaints = []
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("console", lambda line: line.type == "error" and page.complaints.append(line.text))
    page.goto(f"{served.root}/owner/enter?key={Raters(served.data).owner_token()}")
    page.get_by_role("link", name="x").click()
    return page


def test_an_owner_invites_watches_and_revokes(browser: Any, served: Served) -> None:
    config = waiting_campaign(served.data, groups=4, size=3, pixels=16)
    page = owner(browser, served)
    page.evaluate("window.same = true")  # lost by a reload
    page.get_by_label("Name").fill("zoe")
    page.get_by_label("Groups per round, at most").first.fill("3")
    page.get_by_role("button", name="Invite", exact=True).click()
    page.get_by_label("Link", exact=True).wait_for()
    link = page.get_by_label("Link", exact=True).input_value()
    assert link in page.get_by_label("Text with the link").input_value()
    page.keyboard.press("Escape")

    rater = browser.new_context().new_page()
    rater.goto(link)
    rater.get_by_role("link", name="x").click()
    rater.wait_for_selector("#page[data-ready]")
    key(rater, "Enter")
    row = page.get_by_role("row", name="zoe")
    page.get_by_role("button", name="Quota of zoe").focus()
    row.locator('[data-head="Groups"]', has_text="1").wait_for(timeout=20_000)
    assert page.evaluate("document.activeElement.dataset.act") == "quota"  # a poll leaves the focus where it was

    page.keyboard.press("Enter")
    page.locator("#quota-value").fill("2")
    page.keyboard.press("Enter")
    row.locator('[data-head="Quota"]', has_text="2").wait_for()
    page.get_by_label("Deal the groups out evenly").check()
    page.get_by_text("Each group has its own raters now.").wait_for()
    assert read_invitations(config.folder).assignment == "split"

    page.get_by_role("button", name="Revoke zoe").click()
    page.get_by_role("button", name="Revoke", exact=True).click()
    row.get_by_text("revoked").wait_for()
    assert rater.goto(f"{served.root}/c/x").status == 401
    assert page.evaluate("window.same")

    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    boxes = [button.bounding_box() for button in page.get_by_role("button").all()]
    assert all(box["height"] >= 44 for box in boxes if box)
    assert page.complaints == []
    served.kill()
    page.get_by_text("No connection to the server").wait_for(timeout=20_000)


def test_an_answer_after_the_campaign_closed_is_kept_until_its_rater_is_invited(browser: Any, served: Served) -> None:
    config = waiting_campaign(served.data, groups=4, size=3, pixels=16)
    page = enter(browser, served, "bob")
    Raters(served.data).invite(config.folder, "ann")
    page.keyboard.press("Enter")
    page.get_by_text("or you may no longer judge it").wait_for()
    assert "again" not in page.locator("#note").inner_text()  # it says nothing of sending it again
    assert page.locator("[aria-busy]").count() == 0
    assert said(config) == []
    Raters(served.data).invite(config.folder, "bob")
    page.reload()
    page.get_by_text("The earlier judgement is saved now.").wait_for()
    assert [entry.rater for entry in said(config)] == ["bob"]
