"""The browser of images and the report in a real browser: no finding of axe, no sideways scrolling."""

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from d3po_core.browser.app import create_app
from d3po_core.report.write import write_report
from d3po_core.store.campaign import campaign_named
from tests.core.small_campaign import write_campaign
from tests.page.test_in_chromium import CHROMIUM, browser
from tests.page.test_rater_in_chromium import axe, findings

__all__ = ["axe", "browser"]
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH: apt-get install chromium")

SCREENS = [(1280, "light"), (390, "dark")]
PAGES = ("/", "/c/small", "/c/small?prompt=none", "/c/small/story/r4-g0-m0", "/c/small/story/r4-e1", "/c/none")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("data")
    write_campaign(folder / "runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("D3PO_DATA", str(folder))
        yield folder


@pytest.fixture(scope="module")
def root(data: Path) -> Iterator[str]:
    """Address of a served browser."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(create_app("secret"), host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


@pytest.mark.parametrize(("width", "scheme"), SCREENS)
def test_axe_finds_nothing_in_the_browser(browser: Any, root: str, axe: str, width: int, scheme: str) -> None:
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, bypass_csp=True)
    page = context.new_page()
    page.goto(f"{root}/enter?key=secret")
    found = {}
    for path in PAGES:
        page.goto(root + path)
        found[path] = findings(page, axe)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path
    assert {path: found[path] for path in PAGES if found[path]} == {}


@pytest.mark.parametrize(("width", "scheme"), SCREENS)
def test_axe_finds_nothing_in_the_report(browser: Any, data: Path, axe: str, width: int, scheme: str) -> None:
    report = write_report(campaign_named("small"), data / f"{width}.html")
    page = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme).new_page()
    page.goto(report.as_uri())
    for details in page.locator("details").all():
        details.evaluate("one => one.open = true")
    assert findings(page, axe) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
