"""The rule for raters' names on the page, on the command line and in imported files."""

import re
import unicodedata
from collections.abc import Iterable

MAX_NAME = 100


def composed(name: str) -> str:
    """The name with composed letters (NFC) and single spaces, so that names that look equal are equal."""
    return re.sub(r"\s+", " ", unicodedata.normalize("NFC", name)).strip()


def name_problem(name: str) -> str | None:
    """The reason why a text is not a valid rater's name, None if it is valid.

    A name has up to ``MAX_NAME`` printable characters of any alphabet, single spaces among them, and no slashes.
    """
    if 0 < len(name) <= MAX_NAME and name.isprintable() and name == composed(name) and not set(name) & set("/\\"):
        return None
    return f"expected up to {MAX_NAME} characters on one line, without slashes and spaces around them"


def other_spellings(names: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """Names that differ only in case from an earlier name, with that name; ``known`` names come first."""
    first: dict[str, str] = {}
    exact = set(known)
    for name in (*exact, *names):
        first.setdefault(name.casefold(), name)
    return {name: first[name.casefold()] for name in names if name not in exact and first[name.casefold()] != name}
