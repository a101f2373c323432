"""Find the campaign's image that a path, an address or a file name means."""

import re
from urllib.parse import parse_qsl, unquote, urlsplit

import pyarrow as pa
import pyarrow.compute as pc

from d3po_core.image_ids import SAMPLE

_EXACT = re.compile(SAMPLE)
# An upload's prefix may precede the id; a browser's copy number and an extension may follow it.
_LAST_PART = re.compile(rf"(?:^|[^a-z0-9])({SAMPLE})(?: ?\([0-9]+\))?(?:\.[a-z]+)?$")


def sample_id_of(text: str) -> str | None:
    """The sample id that a text means, None if it means none.

    It understands ids, file names, paths of any system, addresses with a query or fragment, and Label Studio's forms:
    uploads with a prefix, local files in ``?d=``, HTML with the image's ``src``.
    """
    if _EXACT.fullmatch(text):
        return text
    source = re.search(r"src\s*=\s*['\"]([^'\"]+)", text)
    address = source[1] if source else text
    try:
        parts = urlsplit(address)
        places = [parts.path, *(value for _, value in parse_qsl(parts.query))] if parts.query or parts.scheme else []
    except ValueError:
        places = []
    for place in (*places, address.split("#", 1)[0], address):
        last = re.split(r"[/\\]", unquote(unquote(place)))[-1].strip().lower()
        if found := _LAST_PART.search(last):
            return found[1]
    return None


def names_sample(value: object) -> bool:
    """Return whether a value is text that means an image of a campaign."""
    return isinstance(value, str) and sample_id_of(value) is not None


def sample_ids(cells: pa.ChunkedArray) -> pa.ChunkedArray:
    """The sample that each cell means, or the cell itself if it means none."""
    known = pc.fill_null(pc.match_substring_regex(cells, f"^{SAMPLE}$"), True)
    if pc.all(known).as_py() is not False:
        return cells
    texts = pc.unique(cells)
    meant = pa.array([text and (sample_id_of(text) or text) for text in texts.to_pylist()], pa.string())
    return meant.take(pc.index_in(cells, texts))
