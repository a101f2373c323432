"""The live line in a real terminal: it stays at the foot, and no other output tears it."""

import os
import pty
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest

from d3po.tasks import live_line as module
from d3po.tasks import stage
from d3po.tasks.live_line import _Above, live_line
from d3po.tasks.stage import progress
from d3po_core.config_values import load_config
from d3po_core.paths import PROJECT_ROOT
from d3po_core.store.goals import rounds_to_do

PROGRAM = """
import logging, sys, time
from d3po.tasks.live_line import live_line, say
with live_line("loading"):
    logging.basicConfig(level="INFO", format="%(message)s", handlers=[logging.StreamHandler()])
    time.sleep(0.3)
    done = [0]
    say(lambda: f"round 1 of 2 sample: {done[0]} of 40 images, and a text that is longer than the terminal is wide")
    for done[0] in range(40):
        time.sleep(0.02)
        if done[0] % 10 == 5:
            logging.info("log line %d", done[0])
            print("printed", done[0])
    sys.stderr.write("\\r 50%|#####     | 5/10")
    sys.stderr.flush()
    time.sleep(0.4)
    print("behind a bar", file=sys.stderr)
print("over")
"""


def in_terminal(program: str, columns: int, interrupt_at: bytes | None = None) -> tuple[str, int]:
    """What a program writes to a terminal of this width, and its exit status; Ctrl-C once it has written this."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"COLUMNS": str(columns), "TERM": "xterm", "PYTHONPATH": str(PROJECT_ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], stdout=theirs, stderr=theirs, env=environment
    )
    os.close(theirs)
    found = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the terminal's other end is closed
            break
        if not part:
            break
        found += part
        if interrupt_at and interrupt_at in found:
            process.send_signal(signal.SIGINT)
            interrupt_at = None
    os.close(ours)
    return found.decode(), process.wait(30)


def screen(text: str) -> list[str]:
    """The lines that a terminal shows in the end."""
    rows, row, column = [""], 0, 0
    for part in re.split(r"(\r|\n|\x1b\[2K|\x1b\[1A)", re.sub(r"\x1b\[(?!2K|1A)[0-9;?]*[a-zA-Z]", "", text)):
        if part == "\n":
            row += 1
            rows += [""] * (row + 1 - len(rows))
        elif part == "\x1b[1A":
            row -= 1
        elif part == "\x1b[2K":
            rows[row] = ""
        elif part == "\r":
            column = 0
        else:
            rows[row] = rows[row][:column] + part + rows[row][column + len(part) :]
            column += len(part)
    return [line.rstrip() for line in rows]


@pytest.fixture(scope="module")
def written() -> str:
    written, status = in_terminal(PROGRAM, 60)
    assert status == 0, written
    return written


def test_log_lines_and_prints_are_whole_and_in_order_and_the_line_is_gone(written: str) -> None:
    expected = [line for n in (5, 15, 25, 35) for line in (f"log line {n}", f"printed {n}")]
    assert [line for line in screen(written) if line] == [*expected, "behind a bar", "over"]


def test_the_line_is_drawn_as_it_changes_and_is_never_wider_than_the_terminal(written: str) -> None:
    drawn = re.findall(r"round 1 of 2 sample: (\d+) of 40 images[^\r\n]*", written)
    assert len(set(drawn)) >= 2
    lines = [line for line in re.split(r"[\r\n]", re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", written)) if "round 1" in line]
    assert max(map(len, lines)) <= 60
    assert all(line.endswith("…") for line in lines)
    assert " 50%|#####     | 5/10" in written  # another library's bar takes its place


def test_ctrl_c_takes_the_line_away_and_says_once_how_to_go_on() -> None:
    program = """
    import signal, sys, time
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    from d3po.flows.interrupting import ctrl_c_ends_it
    from d3po.tasks.live_line import live_line
    sys.argv = ["d3po", "run", "round", "--campaign", "a b"]
    with ctrl_c_ends_it(), live_line("at work"):
        print("begun", file=sys.stderr)
        time.sleep(60)
    """
    written, status = in_terminal(program, 100, interrupt_at=b"at work")
    assert status == 130
    assert [line for line in screen(written) if line and line != "begun"] == [
        "d3po: stopped; to go on where it stopped, type again: d3po run round --campaign 'a b'"
    ]
    assert written.rstrip().endswith("'a b'")
    assert written.count("\x1b[?25l") <= written.count("\x1b[?25h")  # the cursor is back


def test_without_a_terminal_nothing_changes(capsys: pytest.CaptureFixture[str]) -> None:
    with live_line("loading"):
        assert not module.is_shown()
        print("plain", file=sys.stderr)
    assert capsys.readouterr().err == "plain\n"


def test_nested_bars_leave_no_lines() -> None:
    written: list[str] = []

    class Lines:
        def print(self, text: object) -> None:
            written.append(str(text))

    above = _Above(Lines(), sys.__stderr__)  # type: ignore[arg-type]
    for part in (
        "\r  0%| | 0/2",
        "\n",
        "\r 10%|# | 1/9",
        "\x1b[A",
        "\n",
        "\r 90%| |\x1b[A",
        "a warning\n",
        "whole",
        "\n",
    ):
        above.write(part)
    assert written == ["a warning", "whole"]


def test_a_long_stage_without_a_live_line_is_a_line_in_the_log_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config({"campaign": "c", "runs_dir": str(tmp_path)}, "test")
    config.folder.mkdir()
    rounds_to_do(config.folder, 12, "run")
    told: list[str] = []

    class Log:
        def info(self, _: str, text: str) -> None:
            told.append(text)

    clock = SimpleNamespace(now=100.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(stage, "time", clock)
    monkeypatch.setattr(stage, "flow_logger", Log)
    monkeypatch.setenv("PREFECT__RUNTIME__FLOW_RUN__ID", "run")
    with progress(config, 3, "train", 30, "update") as bar:
        assert module._text() == "round 3 of 12 train: 0 of 30 updates"
        for _ in range(30):
            clock.now += 10
            bar.update()
        assert module._text() == "round 3 of 12 train: all 30 updates done, finishing"
    assert [text.partition(", ")[0] for text in told] == [
        f"round 3 of 12 train: {done} of 30 updates" for done in (2, 8, 14, 20, 26)
    ]
    assert told[1] == "round 3 of 12 train: 8 of 30 updates, 0.10 updates/s, 03:40 left"
