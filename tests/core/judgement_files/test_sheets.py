"""Sheets: what a rater without the page gets, fills in, and gives back."""

import csv
import io
import json
import re
from collections import Counter
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from urllib.parse import unquote

import pytest

from d3po_core.config import CampaignConfig
from d3po_core.errors import D3POError
from d3po_core.judgement_files.importing import import_file
from d3po_core.judgement_files.sheets import export_sheet
from d3po_core.store.campaign import CAMPAIGN_FILE
from d3po_core.store.tables import read_rows
from tests.core.sampled import PROMPTS, sampled_campaign

MODES = ["pair", "mark_bad", "best", "rank"]
FILLED = {"pair": ("choice", "second"), "mark_bad": ("rating", "good"), "best": ("rank", "2"), "rank": ("rank", "1")}


@pytest.fixture
def campaign(tmp_path: Path) -> CampaignConfig:
    return sampled_campaign(tmp_path / "runs", images=True)


def rows_of(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((folder / "judgements.csv").read_bytes().decode("utf-8-sig"), newline="")))


@pytest.mark.parametrize("mode", MODES)
def test_filled_in_sheet_is_imported_as_it_was_filled_in(campaign: CampaignConfig, tmp_path: Path, mode: str) -> None:
    folder = tmp_path / "sheet"
    report = export_sheet(campaign, folder, mode=mode, rater="=Anna")
    column, answer = FILLED[mode]
    rows = rows_of(folder)
    assert len(rows) == report.num_rows
    for row in rows[::2]:
        row[column] = answer
    with (folder / "judgements.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, rows[0].keys(), delimiter=";")
        writer.writeheader()
        writer.writerows(rows)
    result = import_file(campaign.folder, folder / "judgements.csv")
    assert result.num_bad == 0, result.summary()
    assert (result.num_good, result.num_empty) == ((len(rows) + 1) // 2, len(rows) // 2)
    assert result.written is not None
    found = read_rows(result.written)
    ids = "first_id" if mode == "pair" else "sample_id"
    assert [row["sample_id"] for row in found] == [row[ids] for row in rows[::2]]
    assert {row["rater"] for row in found} == {"=Anna"}
    assert [row["position"] for row in found] == [int(row["position"]) for row in rows[::2]]


def test_the_guideline_is_shown_with_its_examples(campaign: CampaignConfig, tmp_path: Path) -> None:
    saved = json.loads((campaign.folder / CAMPAIGN_FILE).read_text())
    saved["config"]["judge"]["people"]["guideline"] = "*Hands*\n\n![six](r3-g0-m1)\n\n<script>x</script>"
    (campaign.folder / CAMPAIGN_FILE).write_text(json.dumps(saved))
    export_sheet(campaign, tmp_path / "sheet")
    page = (tmp_path / "sheet/sheet.html").read_text()
    [source] = re.findall(r'<em>Hands</em>.*?<img src="([^"]+)" alt="six"', page, re.S)
    assert (tmp_path / "sheet" / unquote(source)).read_bytes() == (
        campaign.folder / "images/round=3/r3-g0-m1.png"
    ).read_bytes()
    assert "<script>" not in page


def test_unfilled_sheet_is_no_judgement(campaign: CampaignConfig, tmp_path: Path) -> None:
    export_sheet(campaign, tmp_path / "sheet")
    with pytest.raises(D3POError, match="holds no judgement; fill in rating"):
        import_file(campaign.folder, tmp_path / "sheet" / "judgements.csv", rater="anna")


def test_pair_sheet_asks_for_every_pair_of_a_group_once(campaign: CampaignConfig, tmp_path: Path) -> None:
    export_sheet(campaign, tmp_path / "sheet", mode="pair")
    pairs = Counter(frozenset((row["first_id"], row["second_id"])) for row in rows_of(tmp_path / "sheet"))
    expected = {frozenset(f"r3-g{g}-m{m}" for m in pair) for g in range(4) for pair in combinations(range(4), 2)}
    assert pairs.keys() == expected
    assert set(pairs.values()) == {1}


def test_order_is_drawn_for_each_rater_and_recorded(campaign: CampaignConfig, tmp_path: Path) -> None:
    orders = {}
    for name, options in {
        "anna": {},
        "anna again": {},
        "ben": {},
        "seed 1": {"seed": 1},
        "seed 2": {"seed": 2},
    }.items():
        folder = tmp_path / name
        export_sheet(campaign, folder, mode="rank", rater=name.partition(" ")[0], **options)
        orders[name] = json.loads((folder / "manifest.json").read_text())["order"]
        rows = rows_of(folder)
        assert [row["sample_id"] for row in rows] == [sample for group in orders[name] for sample in group]
        assert [row["position"] for row in rows] == ["0", "1", "2", "3"] * 4
        assert [sorted(group) for group in orders[name]] == [[f"r3-g{g}-m{m}" for m in range(4)] for g in range(4)]
    assert orders["anna"] == orders["anna again"]
    assert len({json.dumps(orders[name]) for name in ("anna", "ben", "seed 1", "seed 2")}) == 4


def test_positional_list_in_the_sheets_folder_takes_the_sheets_order(campaign: CampaignConfig, tmp_path: Path) -> None:
    export_sheet(campaign, tmp_path / "sheet")
    order = json.loads((tmp_path / "sheet" / "manifest.json").read_text())["order"]
    file = tmp_path / "sheet" / "labels.json"
    file.write_text(json.dumps([[1, 2, 3, 4]] * 4))
    result = import_file(campaign.folder, file, rater="anna")
    assert result.written is not None
    assert [(row["sample_id"], row["value"]) for row in read_rows(result.written)] == [
        (sample, value) for group in order for value, sample in enumerate(group, 1)
    ]


@pytest.mark.parametrize("mode", MODES)
def test_no_cell_of_the_csv_is_a_formula(campaign: CampaignConfig, tmp_path: Path, mode: str) -> None:
    export_sheet(campaign, tmp_path / "sheet", mode=mode, rater="@SUM(A1)")
    cells = [cell for row in rows_of(tmp_path / "sheet") for cell in row.values()]
    assert [cell for cell in cells if cell.startswith(tuple("=+-@\t\r"))] == []
    assert "'" + PROMPTS[1] in cells


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.sources: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("mode", MODES)
def test_page_shows_every_image_and_prompt_and_needs_nothing_from_elsewhere(
    campaign: CampaignConfig, tmp_path: Path, mode: str
) -> None:
    folder = tmp_path / "sheet"
    export_sheet(campaign, folder, mode=mode)
    page = _Page()
    source = (folder / "sheet.html").read_text(encoding="utf-8")
    page.feed(source)
    assert set(page.sources) == {f"images/r3-g{g}-m{m}.png" for g in range(4) for m in range(4)}
    for sample in page.sources:
        original = campaign.folder / "images" / "round=3" / Path(sample).name
        assert (folder / sample).read_bytes() == original.read_bytes()
    assert all(prompt in page.text for prompt in PROMPTS), "prompts are text, not markup"
    assert page.tags["b"] == page.tags["script"] == page.tags["link"] == 0
    assert not re.search(r"url\(|@import", source)


def test_only_the_asked_groups_are_in_the_sheet(campaign: CampaignConfig, tmp_path: Path) -> None:
    report = export_sheet(campaign, tmp_path / "sheet", 2, groups=["r2-g1"])
    assert (report.round_number, report.num_images) == (2, 4)
    with pytest.raises(D3POError, match="has no group r2-g77"):
        export_sheet(campaign, tmp_path / "other", 2, groups=["r2-g77"])


def test_filled_in_sheet_is_never_overwritten(campaign: CampaignConfig, tmp_path: Path) -> None:
    export_sheet(campaign, tmp_path / "sheet")
    before = (tmp_path / "sheet" / "judgements.csv").read_bytes()
    with pytest.raises(D3POError, match="holds something already, perhaps a filled-in sheet"):
        export_sheet(campaign, tmp_path / "sheet", seed=5)
    assert (tmp_path / "sheet" / "judgements.csv").read_bytes() == before
    (tmp_path / "empty").mkdir()
    export_sheet(campaign, tmp_path / "empty")


def test_sheet_with_a_missing_image_is_not_written_by_halves(campaign: CampaignConfig, tmp_path: Path) -> None:
    (campaign.folder / "images/round=3/r3-g2-m1.png").unlink()
    with pytest.raises(D3POError, match=r"r3-g2-m1.png is gone; draw it again"):
        export_sheet(campaign, tmp_path / "out" / "sheet")
    assert not (tmp_path / "out").exists()


def test_round_without_images_is_refused(campaign: CampaignConfig, tmp_path: Path) -> None:
    with pytest.raises(D3POError, match="round 9 of campaign 'shapes' has no images; rounds that have: 1, 2, 3"):
        export_sheet(campaign, tmp_path / "sheet", 9)
