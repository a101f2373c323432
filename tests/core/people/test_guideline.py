"""A guideline in Markdown: what it shows, and that nothing in it can do harm or reach outside the campaign."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from d3po_core.config import PeopleConfig
from d3po_core.people.guideline import Guideline, guideline_image, guideline_text, render_guideline
from d3po_core.ways import WAYS
from tests.core.people.labelling import waiting_campaign

HARMLESS = {"p", "br", "h3", "h4", "h5", "h6", "ul", "ol", "li", "em", "strong", "code", "pre", "blockquote", "hr", "a",
            "img"}  # fmt: skip


class Tags(HTMLParser):
    """Every element of a text with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def rendered(text: str, campaign: Path = Path("/nowhere")) -> Guideline:
    return render_guideline(text, campaign, lambda path: f"/i/{path.name}")


def test_a_short_paragraph_is_shown_as_it_is_and_needs_no_dialog() -> None:
    assert rendered("Is the *hand* right?\nLook twice.") == Guideline(
        "<p>Is the <em>hand</em> right?<br />\nLook twice.</p>\n", ""
    )


def test_what_is_longer_opens_by_itself_and_leaves_out_no_level_of_headings() -> None:
    found = rendered("Look at the hands.\n\n### Good\n\n- five fingers\n\n# Bad\n\nsix")
    assert found.short == "<p>Look at the hands.</p>\n"
    assert re.findall(r"<(h\d)>(\w+)", found.whole) == [("h3", "Good"), ("h3", "Bad")]
    assert "<li>five fingers</li>" in found.whole
    assert rendered("word " * 100).whole  # a page has no room for it above the images


def test_examples_are_images_of_the_campaign_by_id_or_by_file(tmp_path: Path) -> None:
    folder = waiting_campaign(tmp_path).folder
    (folder / "examples").mkdir()
    (folder / "examples/a hand.JPG").write_bytes(b"jpg")
    found = rendered("![bad <hand>](r1-g0-m2) ![](<examples/a hand.JPG>) ![gone](r9-g0-m0)", folder).whole
    images = [attributes for tag, attributes in Tags(found).found if tag == "img"]
    assert [(image["src"], image["alt"]) for image in images] == [
        ("/i/r1-g0-m2.png", "bad <hand>"), ("/i/a hand.JPG", "")
    ]  # fmt: skip
    assert "[no image r9-g0-m0 in this campaign] gone" in found


@pytest.mark.parametrize(
    "name",
    ["../y/images/round=1/r1-g0-m0.png", "/etc/passwd", "campaign.json", "labels.sqlite", "link.png", "images", "",
     "https://evil.example/x.png", "data:image/png;base64,AA", "x" * 5000 + ".png", "a\0.png", "r1-g0-m0/../x.png"],
)  # fmt: skip
def test_no_file_outside_the_campaign_and_none_that_is_no_image_is_shown(tmp_path: Path, name: str) -> None:
    folder = waiting_campaign(tmp_path).folder
    other = waiting_campaign(tmp_path, "y").folder
    (folder / "link.png").symlink_to(other / "images/round=1/r1-g0-m0.png")
    assert guideline_image(folder, name) is None
    assert guideline_image(folder, "r1-g0-m0") == folder / "images/round=1/r1-g0-m0.png"


@pytest.mark.parametrize(
    "text",
    ["<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "[x](javascript:alert(1))", "[x](vbscript:a)",
     "[x](JaVaScRiPt:alert(1))", "[x](data:text/html,<script>alert(1)</script>)", "<javascript:alert(1)>",
     "[x](/c/other)", "[x](//evil.example)", '![a" onerror="alert(1)](r1-g0-m0)', "<style>*{}</style>",
     '[x](https://a.example "t\\" onclick=\\"alert(1)")', "&lt;script&gt;alert(1)&lt;/script&gt;",
     "[a]: javascript:alert(1)\n\n[a]", "```\n</template><script>alert(1)</script>\n```", '![x](r1-g0-m0"><script>)'],
)  # fmt: skip
def test_no_text_becomes_active(tmp_path: Path, text: str) -> None:
    folder = waiting_campaign(tmp_path).folder
    found = rendered(f"{text}\n\nend", folder)
    for tag, attributes in [*Tags(found.short).found, *Tags(found.whole).found]:
        assert tag in HARMLESS
        assert attributes.keys() <= {"href", "target", "rel", "src", "alt", "draggable", "class"}
        assert re.match(r"https://|$", attributes.get("href") or ""), attributes
        assert re.match(r"/i/|$", attributes.get("src") or ""), attributes


def test_links_open_beside_the_question_and_tell_the_other_site_nothing() -> None:
    [(_, link)] = [
        found for found in Tags(rendered("[more](https://a.example/?q=%22)\n\nx").whole).found if found[0] == "a"
    ]
    assert link == {"href": "https://a.example/?q=%22", "target": "_blank", "rel": "noopener noreferrer"}


def test_each_mode_asks_its_own_question_unless_the_campaign_has_one() -> None:
    texts = {mode: guideline_text(PeopleConfig(), mode) for mode in WAYS}
    assert len(set(texts.values())) == len(WAYS)
    assert texts["pair"].startswith("Which image ")
    assert guideline_text(PeopleConfig(guideline="Look."), "pair") == "Look."
