"""Text that a spreadsheet would run as a formula."""

import re

# A cell that a spreadsheet would run; full-width signs count in some of them.
FORMULA_START = "=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20"


def neutralise(text: str) -> str:
    """A cell that no spreadsheet takes for a formula: an apostrophe before what begins one."""
    return f"'{text}" if re.match(f"'*[{FORMULA_START}]", text) else text
