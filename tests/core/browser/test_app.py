"""The browser over HTTP: who is let in, what the pages show, and what no request can reach."""

import io
import json
from pathlib import Path

import pytest
from PIL import Image
from starlette.testclient import TestClient

from d3po_core.browser.app import create_app
from d3po_core.browser.thumbnails import EDGE, thumbnail
from d3po_core.page.gate import Guard
from d3po_core.store.campaign import CAMPAIGN_FILE
from tests.core.people.labelling import bring_in, waiting_campaign
from tests.core.small_campaign import write_campaign

SECRET = "s" * 43


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tmp_path_factory.mktemp("data")
    write_campaign(data / "runs")
    waiting_campaign(data, "people", groups=2, size=2)
    (data / "runs" / "people" / "stages" / "round=1" / "waiting.json").write_text("{}")
    (data / "runs" / "broken").mkdir()
    (data / "runs" / "broken" / CAMPAIGN_FILE).write_text("{")
    (data / "runs" / "broken" / "rounds" / "round=1").mkdir(parents=True)
    (data / "runs" / "broken" / "rounds" / "round=1" / "part.parquet").write_text("no table")
    return data / "runs"


@pytest.fixture(scope="module")
def app(runs: Path) -> Guard:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("D3PO_DATA", str(runs.parent))
        return create_app(SECRET)


@pytest.fixture(autouse=True)
def _own_data(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("D3PO_DATA", str(runs.parent))


@pytest.fixture
def stranger(app: Guard) -> TestClient:
    return TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False)


@pytest.fixture
def browser(stranger: TestClient) -> TestClient:
    assert stranger.get(f"/enter?key={SECRET}").url.path == "/"
    return stranger


@pytest.mark.parametrize("path", ["/", "/c/small", "/c/small/story/r2-g1-m0", "/c/small/small/r2-g1-m0",
                                  "/c/small/image/r2-g1-m0"])  # fmt: skip
def test_nothing_is_shown_without_the_link(stranger: TestClient, path: str) -> None:
    assert stranger.get(path).status_code == 401
    assert stranger.get(path, headers={"cookie": "d3po_browse=guess"}).status_code == 401
    assert "prompt" not in stranger.get(path).text


def test_a_wrong_key_lets_nobody_in(stranger: TestClient) -> None:
    for key in ("", "guess", SECRET[:-1], "%FF", "%00"):
        assert stranger.get(f"/enter?key={key}").status_code == 401


def test_other_hosts_and_other_methods_are_refused(browser: TestClient) -> None:
    foreign = browser.get("/", headers={"host": "example.com"})
    assert (foreign.status_code, "open the page as http://127.0.0.1" in foreign.text) == (400, True)
    assert browser.post("/c/small", json={}).status_code in (403, 405)


def test_campaigns_are_a_table_and_a_broken_one_says_why(browser: TestClient) -> None:
    text = browser.get("/").text
    assert "2 of 2 groups wait for people" in text
    assert "0.625 [0.525, 0.725]" in text  # round 4: (1 + 1 + 0 + 0.5) / 4, and 0.1 to either side
    assert "broken/campaign.json: cannot be read" in text
    assert 'href="/c/broken"' not in text


def test_a_page_of_images_keeps_its_filters(browser: TestClient) -> None:
    answer = browser.get("/c/small", params={"prompt": "of g1", "round": "2", "low": "", "order": "best"})
    assert "3 images" in answer.text
    assert 'value="of g1"' in answer.text
    assert '<option value="2" selected>' in answer.text
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")


def test_prompts_are_text_and_never_markup(browser: TestClient) -> None:
    text = browser.get("/c/people").text
    assert "prompt &lt;b&gt;0&lt;/b&gt; &amp; co" in text
    assert "<b>" not in text
    assert "<script>" not in browser.get("/c/people", params={"prompt": "<script>alert(1)</script>"}).text


@pytest.mark.parametrize(
    "query", ["round=x", "low=a", "order=random", "kind=none", "judged=maybe", "page=x", "round=1.5"]
)
def test_filters_that_do_not_fit_are_one_line(browser: TestClient, query: str) -> None:
    answer = browser.get(f"/c/small?{query}")
    assert answer.status_code == 422
    assert f"These filters have a value that does not fit: {query.partition('=')[0]}." in answer.text


@pytest.mark.parametrize("query", ["page=0", "page=-3", "page=999999999999", "round=99999999999999999999", "unknown=1"])
def test_odd_numbers_do_no_harm(browser: TestClient, query: str) -> None:
    assert browser.get(f"/c/small?{query}").status_code in (200, 422)


def test_the_story_of_an_image_is_that_of_d3po_show(browser: TestClient) -> None:
    text = browser.get("/c/small/story/r3-g0-m0").text
    for word in ("prompt of g0", "r3-g0, member 0", "checkpoints/round=2", "ann", "bob", "cat", "Pairs: "):
        assert word in text
    held_out = browser.get("/c/small/story/r4-e1").text
    assert "Compared blind" in held_out
    assert "The same prompt and seed in every round: 5" in held_out


def test_the_story_keeps_both_bad_apart_from_a_tie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("D3PO_DATA", str(tmp_path))
    config = waiting_campaign(tmp_path, "pairs", groups=2, size=2, pixels=1)
    choice = {"kind": "choice", "value": 0.0}
    groups = [{"sample_id": f"r1-g{group}-m0", "other_id": f"r1-g{group}-m1"} for group in range(2)]
    bring_in(config, [choice | groups[0] | {"both_bad": True}, choice | groups[1] | {"both_bad": False}])
    client = TestClient(create_app(SECRET), base_url="http://127.0.0.1")
    client.get(f"/enter?key={SECRET}")
    bad, tie = (client.get(f"/c/pairs/story/r1-g{group}-m0").text for group in range(2))
    assert "<td>True</td>" in bad
    assert "<td>True</td>" not in tie


@pytest.mark.parametrize("path", ["/c/none", "/c/small/story/r9-g9-m9", "/c/small/image/r9-g9-m9", "/c/..%2fsmall",
                                  "/c/small/image/..%2f..%2fcampaign.json", "/c/%2e%2e/image/x"])  # fmt: skip
def test_what_is_not_there_is_not_found(browser: TestClient, path: str) -> None:
    assert browser.get(path).status_code == 404


def test_images_and_thumbnails_are_the_files(browser: TestClient, runs: Path, tmp_path: Path) -> None:
    file = runs / "small" / "images" / "round=2" / "r2-g1-m0.png"
    assert browser.get("/c/small/image/r2-g1-m0").content == file.read_bytes()
    assert browser.get("/c/small/small/r2-g1-m0").content == file.read_bytes()  # small as it is
    Image.new("RGB", (1024, 512), (10, 200, 30)).save(tmp_path / "large.png")
    made = thumbnail(tmp_path / "large.png")
    assert made is not None
    with Image.open(io.BytesIO(made[0])) as image:
        assert image.size == (EDGE, EDGE // 2)
        assert made[1] == "image/webp"
    (tmp_path / "cut.png").write_bytes((tmp_path / "large.png").read_bytes()[:40])
    assert thumbnail(tmp_path / "cut.png") is None
    assert thumbnail(tmp_path / "gone.png") is None


def test_a_damaged_campaign_names_its_file(browser: TestClient) -> None:
    answer = browser.get("/c/broken")
    assert answer.status_code == 503
    assert "part.parquet is no readable Parquet file" in answer.text


@pytest.mark.parametrize("number", [-1, 0, 2**63 - 1, 10**30])
def test_any_number_is_a_page(browser: TestClient, number: int) -> None:
    answer = browser.get(f"/c/small?page={number}")
    assert answer.status_code == 200
    assert ("r2-g1-m0" in answer.text) == (number < 1)


def test_a_folder_whose_name_is_no_text_hides_no_other(browser: TestClient, runs: Path) -> None:
    odd = runs / "odd\udcff"
    odd.mkdir()
    try:
        (odd / CAMPAIGN_FILE).write_text("{")
        answer = browser.get("/")
        assert answer.status_code == 200
        assert "small" in answer.text
        assert "odd\\udcff" in answer.text
    finally:
        (odd / CAMPAIGN_FILE).unlink()
        odd.rmdir()


def test_the_door_says_who_it_is(stranger: TestClient) -> None:
    assert json.loads(stranger.get("/health").text) == {"service": "d3po browse"}
