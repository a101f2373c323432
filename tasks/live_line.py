"""The line at the foot of a terminal that says what a run is doing; all other output scrolls above it."""

import contextlib
import io
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

LINE_UP = "\x1b[A"

_live: Live | None = None
_text: Callable[[], str] = str
_spinner = Spinner("dots")


@contextlib.contextmanager
def live_line(text: str) -> Iterator[None]:
    """Within this context, keep a live line that begins with a text; only if standard error is a terminal."""
    global _live
    console = Console(file=sys.stderr, soft_wrap=True, highlight=False)
    if not sys.stderr.isatty() or console.is_dumb_terminal:
        yield
        return
    say(lambda: text)
    _live = Live(
        console=console, get_renderable=_line, transient=True, redirect_stdout=False, redirect_stderr=False
    )  # fmt: skip
    streams = sys.stdout, sys.stderr
    # Before Prefect is imported: its log keeps the stream that it finds.
    sys.stderr = _Above(console, sys.stderr)
    if sys.stdout.isatty():
        sys.stdout = _Above(console, sys.stdout)
    try:
        with _live:
            yield
    finally:
        _live = None
        sys.stdout, sys.stderr = streams


def say(text: Callable[[], str]) -> None:
    """Make the live line show this text, called again whenever the line is drawn."""
    global _text
    _text = text


def is_shown() -> bool:
    """Return whether a live line is on a terminal."""
    return _live is not None


def take_away() -> None:
    """Remove the live line, before the process ends without leaving its context."""
    if _live is not None:
        _live.stop()


def _line() -> Text:
    line = Text(f"{_spinner.render(time.monotonic())} {_text()}")
    line.no_wrap, line.overflow = True, "ellipsis"
    return line


class _Above(io.TextIOBase):
    """A terminal's stream while there is a live line: whole lines go above it.

    Another library's progress bar, such as a download's, becomes the live line.
    """

    def __init__(self, console: Console, stream: TextIO) -> None:
        self._console, self._stream, self._rest = console, stream, ""

    def write(self, text: str) -> int:
        *lines, rest = (self._rest + text.replace(LINE_UP, "")).split("\n")
        for line in lines:  # a bar moves between lines by empty ones
            if line.strip() and "\r" not in line.rstrip("\r"):
                self._console.print(Text.from_ansi(line.rstrip("\r")))
        if "\r" in rest:
            if bar := rest.rpartition("\r")[2].strip():
                say(lambda: bar)
            rest = ""
        self._rest = rest
        return len(text)

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._stream.fileno()

    def __getattribute__(self, name: str) -> Any:
        # TextIOBase has attributes of these names, without values.
        if name in ("encoding", "errors", "newlines"):
            return getattr(self._stream, name)
        return super().__getattribute__(name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
