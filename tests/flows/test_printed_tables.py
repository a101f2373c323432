"""Tables of the command line: digits, and terminals that are too narrow."""

import io
import re
from datetime import datetime

import pytest

from d3po.flows.commands.parts import print_table


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def printed(columns: tuple[str, ...], row: tuple[object, ...]) -> list[str]:
    stream = Terminal()
    print_table(columns, [row], stream)
    return [re.sub(r"\x1b\[[0-9;]*m", "", line).rstrip() for line in stream.getvalue().splitlines()]


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "xterm")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.7426573426573427, "0.7427"),
        (1234.56789, "1234.5679"),
        (0.0, "0"),
        (2e-5, "2e-05"),
        (float("nan"), "nan"),
        (12345678901, "12345678901"),
        ({"brightness": 0.1234567}, "brightness: 0.1235"),
        (datetime(2026, 1, 2, 3, 4, 5, 678), "2026-01-02 03:04:05"),
        (None, ""),
    ],
)
def test_numbers_have_the_digits_that_matter(value: object, shown: str) -> None:
    assert shown == printed(("x",), (value,))[3].strip("│ ")


def test_words_wrap_in_a_table_that_can_be_narrow() -> None:
    lines = printed(("round", "prompt"), (1, "a red circle on a gray background, and more of it"))
    assert max(map(len, lines)) <= 40
    assert len(lines) == 6


def test_a_row_that_cannot_be_narrow_is_printed_below_each_other_and_whole() -> None:
    digest = "c43bec3d7682fac008cb24266c45961f12b3375c3b81869d37a54fe05ac56fcc"
    lines = printed(("round", "sha256"), (3, digest))
    assert lines == ["round   3", f"sha256  {digest}", ""]
