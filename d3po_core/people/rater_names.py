"""The one rule for the names of raters, in the page, the command line and imported files."""

import re
import unicodedata
from collections.abc import Iterable

MAX_NAME = 100


def composed(name: str) -> str:
    """The name with composed letters (NFC) and single spaces, so that what looks the same is the same."""
    return re.sub(r"\s+", " ", unicodedata.normalize("NFC", name)).strip()


def name_problem(name: str) -> str | None:
    """Why a text is no rater's name; None when it is one.

    A name has up to ``MAX_NAME`` printable characters of any alphabet, single spaces among them, no slashes.
    """
    if 0 < len(name) <= MAX_NAME and name.isprintable() and name == composed(name) and not set(name) & set("/\\"):
        return None
    return f"expected up to {MAX_NAME} characters on one line, without slashes and spaces around them"


def other_spellings(names: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """Names that differ only in capitals from a name said before them, and that name; ``known`` names come first."""
    first: dict[str, str] = {}
    exact = set(known)
    for name in (*exact, *names):
        first.setdefault(name.casefold(), name)
    return {name: first[name.casefold()] for name in names if name not in exact and first[name.casefold()] != name}
