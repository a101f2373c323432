"""What a rater's page offers, in a real browser: no finding of axe in any state, keys, themes, phone, reports."""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from d3po_core.people.reports import ImageReports
from tests.core.people.labelling import waiting_campaign
from tests.page import test_in_chromium as shared
from tests.page.test_in_chromium import Served, after, enter, key, said, ticket

browser, pytestmark = shared.browser, shared.pytestmark

PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
ZOOMED = {"viewport": {"width": 640, "height": 400}}
GUIDELINE = "Mark what is wrong.\n\n## Good\n\n- five fingers ![a good hand](r1-g0-m0)\n\n[more](https://a.example)"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One page for all tests, each with a campaign of its own name; a round's last answer can be taken back."""
    served = Served(tmp_path_factory.mktemp("data"), grace_seconds=60.0)
    yield served
    served.kill()


@pytest.fixture(scope="module")
def axe() -> str:
    """The source of axe-core."""
    found = importlib.util.find_spec("axe_playwright_python")
    if found is None or found.origin is None:
        pytest.skip("axe-core is not installed: pip install -e '.[dev]'")
    return (Path(found.origin).parent / "axe.min.js").read_text()


def findings(page: Any, axe: str) -> list[str]:
    page.evaluate(axe)
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
    return [f"{rule['id']} ({rule['impact']}): {node['target']}" for rule in found for node in rule["nodes"]]


@pytest.mark.parametrize(("screen", "theme"), [({}, "light"), (PHONE, "dark")], ids=["wide", "narrow"])
def test_axe_finds_nothing_in_any_state(
    browser: Any, served: Served, axe: str, screen: dict[str, Any], theme: str, request: pytest.FixtureRequest
) -> None:
    name = f"axe-{request.node.callspec.id}"
    waiting_campaign(served.data, name, groups=1, size=7, pixels=16, guideline=GUIDELINE, raters_per_group=2)
    pages = {who: enter(browser, served, who, name, color_scheme=theme, **screen) for who in ("ann", "bob")}
    page, states = pages["ann"], {}
    page.keyboard.press("2")
    for opened, dialog in {"": "", "g": "guideline", "?": "help", "r": "report", "z": "zoom"}.items():
        if opened:
            page.keyboard.press(opened)
            page.locator(f"#{dialog}[open]").wait_for()
        states[dialog] = findings(page, axe)
        page.keyboard.press("Escape")
    page.keyboard.press("r")
    page.get_by_role("button", name="Unsafe").click()
    page.locator(".tile.mine").wait_for()
    pages["bob"].reload()
    states |= {who: findings(one, axe) for who, one in pages.items()}
    key(page, "Enter")
    states["nothing left"] = findings(page, axe)
    for url in ("/", "/c/nothing"):
        page.goto(f"{served.root}{url}")
        states[url] = findings(page, axe)
    assert {state: found for state, found in states.items() if found} == {}


@pytest.mark.parametrize("mode", ["pair", "best", "rank"])
def test_axe_finds_nothing_in_any_mode_on_a_zoomed_laptop(browser: Any, served: Served, axe: str, mode: str) -> None:
    waiting_campaign(served.data, f"axe-{mode}", groups=1, size=3, pixels=16, mode=mode)
    assert findings(enter(browser, served, "ann", f"axe-{mode}", color_scheme="light", **ZOOMED), axe) == []


def test_both_bad_is_a_key_and_a_button_of_its_own(browser: Any, served: Served) -> None:
    config = waiting_campaign(served.data, "both-bad", groups=3, size=2, mode="pair", pixels=16)
    page = enter(browser, served, "ann", "both-bad")
    key(page, "b")
    after(page, lambda: page.get_by_role("button", name="Both bad").click())
    key(page, "ArrowDown")
    assert [entry.answer for entry in said(config)] == [(-1, -1), (-1, -1), (0, 0)]


@pytest.mark.parametrize(("mode", "keys"), [("mark_bad", "13"), ("rank", "312")])
def test_undo_after_the_last_answer_brings_the_marks_back(browser: Any, served: Served, mode: str, keys: str) -> None:
    config = waiting_campaign(served.data, f"undo-{mode}", groups=1, size=4, mode=mode, pixels=16)
    page = enter(browser, served, "ann", f"undo-{mode}")
    for name in keys:
        page.keyboard.press(name)
    marks = """() => [...document.querySelectorAll('.tile')].map(
        tile => tile.matches('.chosen') && tile.querySelector('.mark').dataset.text)"""
    before = page.evaluate(marks)
    key(page, "Enter")
    page.get_by_role("heading", name="Round 1 is done").wait_for()
    answer = said(config)[0].answer
    key(page, "u")
    assert said(config) == []
    assert page.evaluate(marks) == before
    key(page, "Enter")
    assert [entry.answer for entry in said(config)] == [answer]
    assert page.complaints == []


def test_help_opens_by_its_key_and_closes_without_a_judgement(browser: Any, served: Served) -> None:
    config = waiting_campaign(served.data, "help", groups=2, size=3, mode="rank", pixels=16)
    page = enter(browser, served, "ann", "help")
    page.keyboard.press("?")
    assert page.get_by_role("dialog", name="Keys").get_by_text("take the last rank back").is_visible()
    page.keyboard.press("1")  # a key of the question behind the dialog
    page.keyboard.press("Enter")
    page.keyboard.press("Escape")
    assert page.locator(".tile.chosen").count() == 0
    assert said(config) == []


def test_one_number_stands_on_a_ranked_image(browser: Any, served: Served) -> None:
    waiting_campaign(served.data, "one-number", groups=1, size=4, mode="rank", pixels=16)
    page = enter(browser, served, "ann", "one-number")
    page.keyboard.press("3")
    tile = page.locator(".tile").nth(2)
    assert tile.locator(".image > kbd").is_hidden()
    assert tile.locator(".mark").get_attribute("data-text") == "1"
    assert page.locator(".tile").nth(1).locator(".image > kbd").is_visible()


def test_light_and_dark_follow_the_browser_until_the_rater_chooses(browser: Any, served: Served) -> None:
    waiting_campaign(served.data, "theme", groups=1, size=2, pixels=16)
    page = enter(browser, served, "ann", "theme", color_scheme="light")
    ground = "() => getComputedStyle(document.documentElement).backgroundColor.match(/[0-9]+/g).map(Number)[0]"
    page.wait_for_function(f"{ground} > 200")
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(f"{ground} < 60")
    page.keyboard.press("?")
    page.get_by_role("button", name="Light or dark").click()
    page.wait_for_function(f"{ground} > 200")
    for url in (page.url, served.root):  # the choice stays
        page.goto(url)
        page.wait_for_function(f"{ground} > 200")


def test_on_a_phone_nothing_lies_over_an_image(browser: Any, served: Served) -> None:
    waiting_campaign(served.data, "phone", groups=1, size=4, pixels=64)
    page = enter(browser, served, "ann", "phone", **PHONE)
    for tile in page.locator("button.image").all():
        covered = tile.evaluate(
            """e => { const box = e.getBoundingClientRect(), found = [];
                for (let x = 2; x < box.width - 2; x += 12) for (let y = 2; y < box.height - 2; y += 12) {
                    const there = document.elementFromPoint(box.left + x, box.top + y);
                    if (!e.contains(there)) found.push(there && there.className);
                } return found; }"""
        )
        assert covered == []
    page.locator("button.image").nth(2).tap()
    page.get_by_role("button", name="Look at the pixels").tap()
    assert page.locator("#zoom .bar span").inner_text().startswith("3 of 4")


def test_a_blurred_image_is_seen_by_choice_and_then_judged(browser: Any, served: Served) -> None:
    config = waiting_campaign(served.data, "blurred", groups=1, size=2, mode="pair", raters_per_group=2, pixels=16)
    ann, bob = enter(browser, served, "ann", "blurred"), enter(browser, served, "bob", "blurred")
    ann.keyboard.press("r")
    ann.keyboard.press("ArrowRight")
    assert ann.get_by_role("heading", name="Report image 2 of 2").is_visible()
    ann.get_by_role("button", name="Broken").click()
    ann.locator(".tile.mine").wait_for()
    assert list(ImageReports(config.folder).standing().values()) == [{"ann": "broken"}]
    bob.reload()
    blurred = bob.locator(".tile.hidden img")
    assert blurred.evaluate("e => getComputedStyle(e).filter").startswith("blur(")
    index = int(bob.locator(".tile.hidden button.image").get_attribute("data-index"))
    name = ("ArrowLeft", "ArrowRight")[index]
    bob.keyboard.press(name)  # shows it
    assert blurred.count() == 0
    assert said(config) == []
    bob.keyboard.press(name)
    bob.get_by_role("heading", name="Nothing left for you").wait_for()
    assert said(config)[0].answer == ((1, -1), (-1, 1))[index]
    assert ann.complaints == bob.complaints == []


def test_a_report_keeps_the_marks_that_are_not_saved_yet(browser: Any, served: Served) -> None:
    waiting_campaign(served.data, "keeps", groups=2, size=3, pixels=16)
    page = enter(browser, served, "ann", "keeps")
    here = ticket(page)
    page.keyboard.press("2")
    page.keyboard.press("r")
    page.get_by_role("button", name="Unsafe").click()
    page.locator(".tile.mine").wait_for()
    assert ticket(page) == here
    assert page.locator(".tile.chosen").count() == 1


def test_the_first_page_tells_of_new_images_without_a_reload(browser: Any, served: Served) -> None:
    waiting_campaign(served.data, "first-page", groups=1, size=2, pixels=16)
    page = enter(browser, served, "ann", "first-page")
    page.goto(served.root)
    page.wait_for_function("() => document.title.startsWith('(')")
    waiting = int(page.title()[1:].partition(")")[0])
    page.evaluate("window.same = true")
    waiting_campaign(served.data, "first-page-2", groups=1, size=2, pixels=16)
    page.get_by_text("New images wait for you.").wait_for(state="attached")
    assert page.title() == f"({waiting + 1}) d3po label"
    assert page.evaluate("window.same")
    if picture := os.environ.get("D3PO_TEST_PICTURES"):
        page.screenshot(path=f"{picture}/start.png")
