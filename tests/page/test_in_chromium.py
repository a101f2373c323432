"""The page in a real browser: a round by keys alone, by touch, over a killed server, over a lost connection."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest

from d3po_core.config import CampaignConfig
from d3po_core.page.access import Raters
from d3po_core.paths import PROJECT_ROOT
from d3po_core.people.blind import begin_comparison
from d3po_core.people.journal import active, read_entries, sampling_of
from d3po_core.store.images import save_png
from tests.core.evaluation.compared import evaluated
from tests.core.people.labelling import waiting_campaign

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH: apt-get install chromium")

# One process has imported all; each page is a fork of it, which computes nothing before.
SERVERS = """
import json, os, signal, sys
import d3po_core.page.app, d3po_core.page.serving, d3po.tasks.tracking.delivery
from d3po.flows.commands.label import serve_page
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for line in sys.stdin:
    data, told, port, grace_seconds = json.loads(line)
    page = os.fork()
    if not page:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.environ["D3PO_DATA"] = data
        told = open(told, "a", buffering=1)
        serve_page(
            lambda *call: print(*call, file=told), None, ["ann", "bob"], None, "127.0.0.1", port, None,
            grace_seconds=grace_seconds,
        )
        os._exit(0)
    print(page, flush=True)
"""


@cache
def servers() -> "subprocess.Popen[str]":
    """The process that pages are forked from; it ends with this one, which holds its input."""
    environment = os.environ | {"PYTHONPATH": str(PROJECT_ROOT)}
    command = [sys.executable, "-c", SERVERS]
    return subprocess.Popen(command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def new_page(*arguments: Any) -> psutil.Process:
    """A page in a process of its own."""
    parent = servers()
    assert parent.stdin
    assert parent.stdout
    parent.stdin.write(f"{json.dumps(arguments)}\n")
    parent.stdin.flush()
    return psutil.Process(int(parent.stdout.readline()))


class Served:
    """A labelling page in a process of its own, which may be killed and started again on the same port."""

    def __init__(self, data: Path, grace_seconds: float = 0.0) -> None:
        self.data, self.told, self.grace_seconds = data, data / "told.txt", grace_seconds
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.root = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        self.process = new_page(str(self.data), str(self.told), self.port, self.grace_seconds)
        until = time.monotonic() + 60
        while True:
            try:
                assert httpx.get(f"{self.root}/health", trust_env=False).status_code == 200
                return
            except httpx.TransportError:
                assert self.process.is_running()
                assert time.monotonic() < until, "the page did not start within a minute"
                time.sleep(0.05)

    def kill(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):  # a test may have killed it already
            self.process.kill()
            self.process.wait(60)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    served = Served(tmp_path)
    yield served
    served.kill()


def enter(browser: Any, served: Served, rater: str = "ann", campaign: str = "x", **screen: Any) -> Any:
    """A rater's browser on the labelling page; an error or a complaint of the browser fails the test."""
    context = browser.new_context(**({"viewport": {"width": 1280, "height": 800}} | screen))
    page = context.new_page()
    page.complaints = []
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.on("console", lambda line: line.type == "error" and page.complaints.append(line.text))
    page.goto(f"{served.root}/enter?key={Raters(served.data).token(rater)}")
    page.get_by_role("link", name=campaign).click()
    page.wait_for_selector("#page[data-ready]")
    return page


def said(config: CampaignConfig) -> list[Any]:
    return active(read_entries(config.folder, str(sampling_of(config.folder, 1))))


def ticket(page: Any) -> str:
    return str(page.locator(".middle").get_attribute("data-ticket"))


def after(page: Any, act: Any) -> None:
    """Do something and wait until the page shows what comes after it."""
    before = ticket(page)
    act()
    page.wait_for_function("before => document.querySelector('.middle').dataset.ticket !== before", arg=before)


def key(page: Any, name: str) -> None:
    after(page, lambda: page.keyboard.press(name))


def test_a_round_is_marked_by_keys_with_a_reload_an_undo_and_a_finish(browser: Any, served: Served) -> None:
    config = waiting_campaign(served.data, groups=4, size=4, pixels=16)
    page = enter(browser, served)
    page.keyboard.press("2")
    page.keyboard.press("4")
    page.keyboard.press("4")  # and off again
    key(page, "Enter")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Space")
    key(page, "Enter")
    assert [entry.answer for entry in said(config)] == [(1, 0, 1, 1), (1, 0, 1, 1)]
    here = ticket(page)
    page.reload()
    assert ticket(page) == here
    key(page, "u")
    assert len(said(config)) == 1
    page.keyboard.press("2")  # its mark is there again
    key(page, "Enter")  # none is bad
    assert said(config)[1].answer == (1, 1, 1, 1)
    key(page, "s")
    key(page, "Enter")
    assert page.get_by_text("you skipped this one before").is_visible()
    page.keyboard.press("1")
    key(page, "Enter")
    page.get_by_role("heading", name="Round 1 is done; training goes on").wait_for()
    assert [entry.action for entry in said(config)] == ["answer", "answer", "skip", "answer", "answer"]
    assert len({entry.question_id for entry in said(config)}) == 4
    until = time.monotonic() + 10
    while not served.told.read_text() and time.monotonic() < until:
        time.sleep(0.05)
    assert served.told.read_text() == "x 1\n"
    assert all(entry.seconds is not None and 0 <= entry.seconds < 60 for entry in said(config))
    assert page.complaints == []


def test_a_server_that_is_killed_between_judgements_loses_none(browser: Any, served: Served) -> None:
    config = waiting_campaign(served.data, groups=8, size=2, mode="pair", pixels=16)
    page = enter(browser, served)
    for number in range(8):
        key(page, ("ArrowLeft", "ArrowRight", "ArrowDown")[number % 3])
        assert len(said(config)) == number + 1
        if number in (1, 4):
            served.kill()
            served.start()
    page.get_by_role("heading", name="done").wait_for()
    assert [entry.answer for entry in said(config)] == [((1, -1), (-1, 1), (0, 0))[n % 3] for n in range(8)]


def test_a_judgement_made_while_the_server_is_down_is_kept_in_the_browser_and_sent_later(
    browser: Any, served: Served
) -> None:
    config = waiting_campaign(served.data, groups=3, size=2, mode="pair", pixels=16)
    page = enter(browser, served)
    served.kill()
    page.keyboard.press("ArrowRight")
    page.get_by_text("Not saved yet").wait_for()
    page.keyboard.press("ArrowLeft")  # changes nothing while the first is on its way
    assert said(config) == []
    assert page.evaluate("Object.keys(localStorage).length") == 1
    served.start()
    page.wait_for_function("() => Object.keys(localStorage).length === 0")
    assert [entry.answer for entry in said(config)] == [(-1, 1)]
    key(page, "ArrowLeft")
    assert len(said(config)) == 2


def test_a_judgement_is_sent_even_when_the_page_was_closed_before_it_arrived(browser: Any, served: Served) -> None:
    config = waiting_campaign(served.data, groups=3, size=2, mode="pair", pixels=16)
    page = enter(browser, served)
    asked = ticket(page)
    served.kill()
    page.keyboard.press("ArrowRight")
    page.get_by_text("Not saved yet").wait_for()
    served.start()
    page.goto(f"{served.root}/c/x")
    page.wait_for_function("() => Object.keys(localStorage).length === 0")
    assert [entry.answer for entry in said(config)] == [(-1, 1)]
    assert ticket(page) != asked


def test_an_answer_that_is_lost_on_its_way_back_is_kept_once(browser: Any, served: Served) -> None:
    config = waiting_campaign(served.data, groups=3, size=2, mode="pair", pixels=16)
    page = enter(browser, served)
    lost = []

    def lose_the_first_answer(route: Any) -> None:
        if lost:
            return route.continue_()
        route.fetch()  # it reaches the server
        lost.append(route.request.post_data)
        return route.abort()

    page.route("**/judge", lose_the_first_answer)
    key(page, "ArrowRight")
    assert len(lost) == 1
    assert [entry.answer for entry in said(config)] == [(-1, 1)]


def test_a_double_click_judges_once(browser: Any, served: Served) -> None:
    config = waiting_campaign(served.data, groups=6, size=2, mode="pair", pixels=16)
    page = enter(browser, served)
    page.route("**/judge", lambda route: (time.sleep(0.3), route.continue_()))  # slow enough for a second click
    after(page, lambda: page.locator("button.image").first.dblclick())
    page.wait_for_timeout(500)
    assert len(said(config)) == 1
    page.evaluate("document.querySelector('#tie').click(), document.querySelector('#tie').click()")
    page.wait_for_timeout(1000)
    assert len(said(config)) == 2


def test_two_tabs_and_two_raters_lose_and_double_nothing(browser: Any, served: Served) -> None:
    config = waiting_campaign(served.data, groups=5, size=2, mode="pair", raters_per_group=2, pixels=16)
    tab = enter(browser, served)
    other = tab.context.new_page()
    other.goto(f"{served.root}/c/x")
    bob = enter(browser, served, "bob")
    assert ticket(tab) == ticket(other)
    key(tab, "ArrowLeft")
    key(other, "ArrowRight")
    other.get_by_text("in another window").wait_for()
    key(bob, "ArrowLeft")
    for page in (tab, other, bob) * 6:
        page.goto(f"{served.root}/c/x")
        if page.locator(".middle").get_attribute("data-state") == "question":
            key(page, "ArrowDown")
    kept = said(config)
    assert len(kept) == len({(entry.rater, entry.question_id) for entry in kept}) == 10
    assert len(served.told.read_text().splitlines()) == 1


def test_the_next_round_shows_without_a_touch(browser: Any, served: Served) -> None:
    config = waiting_campaign(served.data, groups=1, size=2, mode="pair", pixels=16)
    page = enter(browser, served)
    key(page, "ArrowLeft")
    page.get_by_role("heading", name="Round 1 is done").wait_for()
    (config.folder / "stages/round=1/derive.json").write_text("{}")
    page.get_by_role("heading", name="Waiting for the next round").wait_for()
    waiting_campaign(served.data, groups=1, size=2, mode="pair", round_number=2)
    page.get_by_text("round 2").wait_for()
    assert page.title().startswith("Round 2"), "the window says so, even if another is in front"
    assert page.locator("button.image").count() == 2


@pytest.mark.parametrize(
    ("mode", "keys", "answer"),
    [("best", ["3"], (2, 2, 1, 2)), ("best", ["ArrowRight", "Space"], (2, 1, 2, 2)),
     ("rank", ["3", "1", "4", "2", "Enter"], (2, 4, 1, 3)), ("rank", ["2", "Enter"], (2, 1, 2, 2)),
     ("rank", ["2", "1", "Backspace", "4", "Enter"], (3, 1, 3, 2))],
)  # fmt: skip
def test_best_and_rank_by_keys(
    browser: Any, served: Served, mode: str, keys: list[str], answer: tuple[int, ...]
) -> None:
    config = waiting_campaign(served.data, groups=2, size=4, mode=mode, pixels=16)
    page = enter(browser, served)
    *first, last = keys
    for name in first:
        page.keyboard.press(name)
    key(page, last)
    assert [entry.answer for entry in said(config)] == [answer]


def test_every_control_is_reached_by_tab_and_its_focus_is_seen(browser: Any, served: Served) -> None:
    waiting_campaign(served.data, groups=2, size=3, pixels=16)
    page = enter(browser, served)
    reached = set()
    for _ in range(20):
        page.keyboard.press("Tab")
        seen = page.evaluate("""() => { const e = document.activeElement, s = getComputedStyle(e);
            const name = e.id || e.getAttribute('aria-label') || e.textContent.trim();
            return [name, parseFloat(s.outlineWidth), s.outlineStyle] }""")
        if seen[0] and page.evaluate("document.activeElement !== document.body"):
            assert seen[1] >= 2, seen
            assert seen[2] != "none", seen
            reached.add(seen[0])
    names = {f"Image {n} of 3: bad" for n in (1, 2, 3)} | {f"Look at the pixels of image {n}" for n in (1, 2, 3)}
    assert reached >= names | {"skip", "save", "x"}


def test_pixels_are_shown_sharp_and_large_and_left_by_key(browser: Any, served: Served) -> None:
    config = waiting_campaign(served.data, groups=1, size=3, pixels=16)
    page = enter(browser, served)
    page.keyboard.press("z")
    picture = page.locator("#zoom img")
    picture.wait_for()
    assert picture.evaluate("e => getComputedStyle(e).imageRendering") == "pixelated"
    size = picture.bounding_box()
    assert size["width"] == size["height"]
    assert size["width"] % 16 == 0
    first = picture.get_attribute("src")
    page.keyboard.press("ArrowRight")
    assert picture.get_attribute("src") != first
    page.keyboard.press("-")
    assert picture.bounding_box()["width"] < size["width"]
    page.keyboard.press("Escape")
    picture.wait_for(state="hidden")
    assert said(config) == []


@pytest.mark.parametrize(("mode", "size"), [("mark_bad", 4), ("mark_bad", 7), ("pair", 2), ("best", 16)])
def test_a_phone_shows_all_without_scrolling_sideways_and_is_judged_by_touch(
    browser: Any, served: Served, mode: str, size: int
) -> None:
    config = waiting_campaign(served.data, groups=2, size=size, mode=mode, pixels=64)
    page = enter(browser, served, viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    for button in page.locator("button:visible").all():
        box = button.bounding_box()
        assert box["width"] >= 44, button.get_attribute("aria-label")
        assert box["height"] >= 44, button.get_attribute("aria-label")
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 390
    tiles = [tile.bounding_box() for tile in page.locator("button.image").all()]
    if size < 8:
        assert all(box["y"] + box["height"] <= 844 for box in tiles)
        assert tiles[0]["width"] >= 150
    if size >= 8:
        page.locator("button.image").nth(size - 1).scroll_into_view_if_needed()
        page.locator("#more").wait_for(state="hidden")
    if mode == "mark_bad":
        page.locator("button.image").nth(1).tap()
        after(page, lambda: page.locator("#save").tap())
    else:
        after(page, lambda: page.locator("button.image").nth(1).tap())
    values = {"mark_bad": (1, 0, *[1] * (size - 2)), "pair": (-1, 1), "best": (2, 1, *[2] * (size - 2))}
    assert [entry.answer for entry in said(config)] == [values[mode]]
    assert page.complaints == []


@pytest.mark.parametrize("screen", [(1280, 800), (640, 400), (390, 844)])
def test_seven_images_are_all_seen_at_once(browser: Any, served: Served, screen: tuple[int, int]) -> None:
    waiting_campaign(served.data, groups=1, size=7, pixels=64, guideline="Mark what does not show the prompt. " * 6)
    width, height = screen
    page = enter(browser, served, viewport={"width": width, "height": height})
    for tile in page.locator("button.image").all():
        assert tile.evaluate(
            """e => { const box = e.getBoundingClientRect();
                return [[0.1, 0.1], [0.9, 0.9]].every(([x, y]) => {
                    const there = document.elementFromPoint(box.left + x * box.width, box.top + y * box.height);
                    return there && (e === there || e.contains(there)); }) }"""
        ), tile.get_attribute("aria-label")
    assert page.locator("#more").is_hidden()
    assert page.locator("#save").is_enabled()
    if picture := os.environ.get("D3PO_TEST_PICTURES"):
        page.screenshot(path=f"{picture}/seven-{width}.png")


@pytest.mark.parametrize("mode", ["mark_bad", "best", "rank"])
def test_nothing_is_saved_before_every_image_was_on_the_screen(browser: Any, served: Served, mode: str) -> None:
    config = waiting_campaign(served.data, groups=2, size=16, mode=mode, pixels=64)
    page = enter(browser, served, viewport={"width": 320, "height": 256})
    if picture := os.environ.get("D3PO_TEST_PICTURES"):
        page.screenshot(path=f"{picture}/sixteen-{mode}.png")
    assert page.locator("#more").inner_text().endswith("more below ↓")
    page.keyboard.press("1")
    page.keyboard.press("Enter")
    page.get_by_text("scroll to them first").wait_for()
    assert said(config) == []
    while page.locator("#more").is_visible():
        page.evaluate("document.querySelector('#more').click()")
        page.wait_for_timeout(20)
    if mode != "best":
        assert page.locator("#save").is_enabled()
    key(page, "1" if mode == "best" else "Enter")
    assert len(said(config)) == 1
    assert page.complaints == []


def test_a_link_followed_from_elsewhere_asks_before_another_rater_is_replaced(browser: Any, served: Served) -> None:
    waiting_campaign(served.data, groups=2, size=2, pixels=16)
    page = enter(browser, served, "ann")
    # Another site to the browser: it keeps the strict cookie back from the first request.
    elsewhere = f"http://localhost:{served.port}/health"
    for rater, greeting in (("ann", "What waits for you, ann"), ("bob", "You are ann here")):
        page.goto(elsewhere)
        link = f"{served.root}/enter?key={Raters(served.data).token(rater)}"
        page.evaluate("link => { location.href = link }", link)
        page.get_by_role("heading", name=greeting).wait_for()
    page.get_by_role("link", name="Go on as bob").click()
    page.get_by_role("heading", name="What waits for you, bob").wait_for()


def test_what_comes_next_is_fetched_before_it_is_asked(browser: Any, served: Served) -> None:
    waiting_campaign(served.data, groups=5, size=2, mode="pair", pixels=16)
    page = enter(browser, served)
    page.wait_for_load_state("networkidle")
    following = page.locator(".middle").get_attribute("data-ahead").split()[:2]
    key(page, "ArrowLeft")
    shown = [picture.get_attribute("src") for picture in page.locator("button.image img").all()]
    assert shown == following
    page.wait_for_load_state("networkidle")
    transfers = page.evaluate(
        """urls => urls.map(url => performance.getEntriesByName(new URL(url, location).href)
                              .filter(entry => entry.transferSize > 0).length)""",
        shown,
    )
    assert all(number <= 1 for number in transfers), "an image that was fetched ahead came again over the network"


def test_checkpoints_are_compared_blind_by_keys_and_the_last_answer_is_taken_back(browser: Any, served: Served) -> None:
    campaign = evaluated(served.data / "runs" / "x", size=16)
    comparison = begin_comparison(campaign, 1, 0, pairs=4).comparison
    page = enter(browser, served)
    for name in ("ArrowLeft", "ArrowDown", "s", "ArrowRight"):
        key(page, name)
    assert page.get_by_text("you skipped this one before").is_visible()
    assert page.evaluate("document.documentElement.outerHTML.search(/r[01]-e[0-9]|round=|base model/)") == -1
    key(page, "ArrowRight")
    page.get_by_role("heading", name="Done: every pair is judged").wait_for()
    key(page, "u")
    key(page, "ArrowLeft")
    page.get_by_role("heading", name="Done: every pair is judged").wait_for()
    kept = [entry.answer for entry in active(read_entries(campaign, comparison.id)) if entry.action == "answer"]
    assert kept == [(1, -1), (0, 0), (-1, 1), (1, -1)]
    page.get_by_role("link", name="What else waits for you").click()
    page.get_by_role("heading", name="What waits for you, ann").wait_for()
    assert page.get_by_text("blind comparison").count() == 0
    assert page.complaints == []


@pytest.mark.parametrize("screen", [(1280, 800), (390, 844)])
def test_tiles_have_the_shape_of_their_images(browser: Any, served: Served, screen: tuple[int, int]) -> None:
    """Groups of a round may have several sizes; nothing overflows, and no image is cut or framed by bars."""
    config = waiting_campaign(served.data, groups=3, size=3, pixels=16)
    for group, (height, width) in enumerate([(24, 16), (16, 24), (16, 16)]):
        for member in range(3):
            image = np.full((height, width, 3), 80 * member, np.uint8)
            save_png(image, config.folder / f"images/round=1/r1-g{group}-m{member}.png")
    page = enter(browser, served, viewport={"width": screen[0], "height": screen[1]})
    shapes = set()
    for _ in range(3):
        page.wait_for_function("[...document.querySelectorAll('.tile img')].every(image => image.naturalWidth)")
        tile, image = page.evaluate(
            "(tile => [tile.clientWidth / tile.clientHeight,"
            " tile.querySelector('img').naturalWidth / tile.querySelector('img').naturalHeight])"
            "(document.querySelector('.tile'))"
        )
        assert tile == pytest.approx(image, rel=0.02)
        shapes.add(round(image, 2))
        assert page.evaluate("document.documentElement.scrollWidth") <= screen[0]
        last = page.locator(".tile").last.bounding_box()
        assert last["y"] + last["height"] <= page.locator("footer").bounding_box()["y"]
        key(page, "s")
    assert shapes == {0.67, 1.5, 1.0}
    assert page.complaints == []
