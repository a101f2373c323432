"""``d3po run``'s own Prefect server, with a small server in place of Prefect's, and Ctrl-C in a real terminal."""

import contextlib
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import httpx
import psutil
import pytest

from d3po.tasks import temporary_server
from d3po.tasks.temporary_server import TemporaryServer
from d3po_core.errors import D3POError
from d3po_core.paths import PROJECT_ROOT

ANSWERS = """
import http.server, os, socket, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(f"{os.getpid()} {os.getsid(0)}".encode())
    def log_message(self, *_): pass
server = http.server.HTTPServer(("127.0.0.1", 0), Handler, bind_and_activate=False)
server.socket = socket.socket(fileno=int(sys.argv[1]))
server.serve_forever()
"""


@pytest.fixture
def server() -> Iterator[Callable[[str], tuple[TemporaryServer, list[str]]]]:
    made: list[TemporaryServer] = []

    def start(program: str) -> tuple[TemporaryServer, list[str]]:
        lost: list[str] = []
        made.append(TemporaryServer(lost.append, (sys.executable, "-c", program)))
        return made[-1], lost

    yield start
    for each in made:
        each.stop()


def answer(server: TemporaryServer) -> tuple[int, int]:
    pid, session = httpx.get(f"{server.url}/health", trust_env=False, timeout=20).text.split()
    return int(pid), int(session)


def test_a_server_that_dies_is_started_again_behind_the_same_address(
    server: Callable[[str], tuple[TemporaryServer, list[str]]],
) -> None:
    running, lost = server(ANSWERS)
    running.wait()
    pid, session = answer(running)
    assert session == pid != os.getsid(0)  # Ctrl-C in the run's terminal does not reach it
    os.kill(pid, signal.SIGKILL)
    again, _ = answer(running)  # waits until it is there
    assert again != pid
    assert not lost
    running.stop()
    assert not psutil.pid_exists(again)


def test_a_server_that_dies_again_and_again_is_lost_in_one_line(
    server: Callable[[str], tuple[TemporaryServer, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(temporary_server, "LIVES", 2)
    running, lost = server(ANSWERS)
    running.wait()
    for _ in range(2):
        os.kill(answer(running)[0], signal.SIGKILL)
    deadline = time.monotonic() + 20
    while not lost and time.monotonic() < deadline:
        time.sleep(0.05)
    assert lost == ["Prefect's temporary server died 2 times (exit status -9)"]


def test_a_server_that_cannot_start_says_why(server: Callable[[str], tuple[TemporaryServer, list[str]]]) -> None:
    running, _ = server("import sys; print('some words'); sys.exit('database is locked')")
    with pytest.raises(D3POError) as error:
        running.wait()
    assert str(error.value) == ("Prefect's temporary server ended while it started (exit status 1): database is locked")


def test_a_server_that_hangs_is_waited_for_and_then_named(
    server: Callable[[str], tuple[TemporaryServer, list[str]]], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert temporary_server.START_SECONDS >= 120  # Prefect's own 20 s were too short on a busy machine
    monkeypatch.setattr(temporary_server, "START_SECONDS", 0.5)
    monkeypatch.setattr(temporary_server, "SAY_SO_SECONDS", 0.1)
    running, _ = server("import time; time.sleep(60)")
    with pytest.raises(D3POError, match=r"did not answer within 0 s.*Type the same command again"):
        running.wait()
    assert "starts slowly; waiting up to" in capsys.readouterr().err


def test_the_server_ends_with_its_run_however_that_ends() -> None:
    program = (
        "import os, signal; from d3po.tasks.temporary_server import TemporaryServer\n"
        "server = TemporaryServer(print); print(server._process.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT_ROOT, capture_output=True, text=True, timeout=60)
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(int(done.stdout)).wait(60)


# The main thread is in a call that no exception ends before it returns, as a large product or a pool of threads is.
BUSY = """
import ctypes, sys
from d3po.flows.interrupting import ctrl_c_ends_it
sys.argv = ["d3po", "run", "--set", "campaign=a b"]
with ctrl_c_ends_it():
    print("busy", flush=True)
    ctypes.CDLL(None).sleep(60)
    ctypes.CDLL(None).sleep(60)
"""


def test_ctrl_c_in_a_terminal_ends_a_busy_process_in_one_line_that_says_how_to_go_on() -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(PROJECT_ROOT)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background job, and what it starts, ignore it
        os.execv(sys.executable, [sys.executable, "-c", BUSY])
    said = b""
    while b"busy" not in said:
        said += os.read(terminal, 1000)
    pressed, said = time.monotonic(), b""
    os.write(terminal, b"\x03")
    with contextlib.suppress(OSError):  # as a terminal's end is read
        while part := os.read(terminal, 1000):
            said += part
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130
    assert time.monotonic() - pressed < 5
    lines = [line for line in said.decode().replace("^C", "").replace("\x1b[?25h", "").splitlines() if line]
    assert lines == ["d3po: stopped; to go on where it stopped, type again: d3po run --set 'campaign=a b'"]
