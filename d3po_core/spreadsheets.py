"""Neutralise text that a spreadsheet would run as a formula."""

import re

# First characters of a cell that a spreadsheet would run; some spreadsheets accept full-width signs.
FORMULA_START = "=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20"


def neutralise(text: str) -> str:
    """Return a cell with an apostrophe in front if a spreadsheet would take it for a formula."""
    return f"'{text}" if re.match(f"'*[{FORMULA_START}]", text) else text
