"""The guideline for raters: Markdown, with example images from the campaign's folder.

It may hold headings, lists, emphasis, links and images. Raw HTML stays text, links lead to web pages or mail addresses
only, and an image is ``![text](r1-g0-m2)``, by its id, or ``![text](examples/hand.png)``, a file of the folder.
"""

import html
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

from markdown_it import MarkdownIt
from markdown_it.token import Token

from d3po_core.config import PeopleConfig
from d3po_core.image_ids import round_of
from d3po_core.ways import WAYS

IMAGES = (".png", ".jpg", ".jpeg", ".webp")
_ID = re.compile(r"r[0-9]{1,9}-(g[0-9]+-m[0-9]+|e[0-9]+)")
_LINK = re.compile(r"(https?://|mailto:)", re.IGNORECASE)
_UNSET = PeopleConfig.model_fields["guideline"].default
# So many characters fit above the images on every screen.
SHORT = 160
ImageUrl = Callable[[Path], str]


@dataclass(frozen=True)
class Guideline:
    """A guideline as safe HTML: its first paragraph, and the whole, which is empty if the page can show all of it."""

    short: str
    whole: str


def guideline_text(people: PeopleConfig, mode: str) -> str:
    """Return the campaign's guideline, or the mode's own if the campaign sets none."""
    return WAYS[mode].guideline if people.guideline == _UNSET else people.guideline


def guideline_image(campaign: Path, name: str) -> Path | None:
    """Return the image file that a guideline names by id or path; None if the campaign's folder has no such image."""
    if _ID.fullmatch(name):
        name = f"images/round={round_of(name)}/{name}.png"
    try:
        path = campaign / (campaign / name).resolve().relative_to(campaign.resolve())
        return path if path.suffix.lower() in IMAGES and path.is_file() else None
    except (OSError, ValueError):  # no name of a file, or of one elsewhere
        return None


def render_guideline(text: str, campaign: Path, image_url: ImageUrl) -> Guideline:
    """Return a guideline as HTML that is safe to put into a page.

    Args:
        text: the guideline, in Markdown.
        campaign: the folder that the images lie in.
        image_url: gives the address under which the page shows a file.
    """
    reader = MarkdownIt("commonmark", {"html": False, "breaks": True})

    def image(_: object, tokens: Sequence[Token], index: int, *__: object) -> str:
        name, alt = unquote(str(tokens[index].attrs["src"])), html.escape(tokens[index].content)
        path = guideline_image(campaign, name)
        if path is None:
            return f'<em class="missing">[no image {html.escape(name)} in this campaign] {alt}</em>'
        return f'<img src="{html.escape(image_url(path))}" alt="{alt}" draggable="false">'

    def link(renderer: object, tokens: Sequence[Token], index: int, *__: object) -> str:
        url = str(tokens[index].attrs["href"])
        if not _LINK.match(url):  # an address inside this page would lead raters away from their question
            return "<a>"
        return f'<a href="{html.escape(url)}" target="_blank" rel="noopener noreferrer">'

    reader.add_render_rule("image", image)
    reader.add_render_rule("link_open", link)
    tokens = reader.parse(text)
    _lower_headings(tokens)
    end = next((index for index, token in enumerate(tokens) if token.type == "paragraph_close"), -1) + 1
    opening = tokens[:end] if tokens and tokens[0].type == "paragraph_open" else []
    plain = bool(opening) and not any(child.type == "image" for child in opening[1].children or ())
    short = reader.renderer.render(opening, reader.options, {}) if plain else ""
    whole = reader.renderer.render(tokens, reader.options, {})
    return Guideline(short, "" if plain and end == len(tokens) and len(text) <= SHORT else whole)


def images_in(text: str, campaign: Path) -> list[Path]:
    """Return the image files of the campaign's folder that a guideline shows, sorted."""
    found: set[Path] = set()

    def note(path: Path) -> str:
        found.add(path)
        return ""

    render_guideline(text, campaign, note)
    return sorted(found)


def _lower_headings(tokens: Sequence[Token]) -> None:
    """Put headings below the page's own, whose last level is 2, without leaving out a level."""
    level = 2
    for token in tokens:
        if token.type == "heading_open":
            level = min(int(token.tag[1]) + 2, level + 1, 6)
        if token.type.startswith("heading_"):
            token.tag = f"h{level}"
