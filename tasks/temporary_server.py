"""The temporary Prefect server of ``d3po run``: a process in its own session that ends with the run.

The run holds the listening socket, so it can restart a dead server behind the same address, while requests wait.
``python -m d3po.tasks.temporary_server DESCRIPTOR`` is the server itself. It ends when its stdin closes, also
after ``kill -9`` of the run.
"""

import atexit
import contextlib
import logging
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable

from d3po_core.errors import D3POError
from d3po_core.paths import PROJECT_ROOT

HOST = "127.0.0.1"
# Prefect needs a minute to migrate a database on busy cores; only a hanging server takes this long.
START_SECONDS = 300.0
SAY_SO_SECONDS = 20.0
# A server that dies this often has a cause that a restart does not fix.
LIVES = 5
PROGRAM = (sys.executable, "-m", "d3po.tasks.temporary_server")
# Prefect's own settings for a temporary server: no page, and migrations once.
SETTINGS = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}


class TemporaryServer:
    """A Prefect server for this process; its address is known at once, and ``wait`` returns when it answers.

    Args:
        lost: called with one line, from another thread, if a server that has answered cannot be kept alive.
        program: the server's command line; the number of the listening socket's descriptor is appended.
    """

    def __init__(self, lost: Callable[[str], None], program: tuple[str, ...] = PROGRAM) -> None:
        self._socket = socket.create_server((HOST, 0))
        self.url = f"http://{HOST}:{self._socket.getsockname()[1]}/api"
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the server)
        self._environment = {k: v for k, v in os.environ.items() if k != "PREFECT_API_URL"} | SETTINGS
        self._lost, self._program, self._answered, self._ending = lost, program, False, False
        self._process = self._start()
        threading.Thread(target=self._keep, name="temporary-server", daemon=True).start()
        atexit.register(self.stop)
        # Prefect would point to the server's page, and it has none.
        logging.getLogger("prefect.flow_runs").addFilter(lambda record: not record.getMessage().startswith("View at "))

    def wait(self) -> None:
        """Return when the server answers.

        Raises:
            D3POError: it ended, or did not answer within ``START_SECONDS``.
        """
        import httpx

        began, said = time.monotonic(), False
        while not self._answered:
            with contextlib.suppress(httpx.HTTPError):
                self._answered = httpx.get(f"{self.url}/health", timeout=2, trust_env=False).is_success
            seconds = time.monotonic() - began
            if self._answered:
                return
            if self._process.poll() is not None:
                raise D3POError(f"Prefect's temporary server ended while it started{self._reason()}")
            if seconds > SAY_SO_SECONDS and not said:
                print(f"Prefect's temporary server starts slowly; waiting up to {START_SECONDS:.0f} s", file=sys.stderr)
                said = True
            if seconds > START_SECONDS:
                raise D3POError(
                    f"Prefect's temporary server did not answer within {START_SECONDS:.0f} s{self._reason()}; is the "
                    "machine very busy? Type the same command again, or start a server that stays: d3po up"
                )
            time.sleep(0.1)

    def stop(self) -> None:
        """End the server; safe to call again."""
        self._ending = True
        self._process.terminate()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def _start(self) -> "subprocess.Popen[bytes]":
        descriptor = self._socket.fileno()
        return subprocess.Popen(
            [*self._program, str(descriptor)],
            cwd=PROJECT_ROOT, env=self._environment, pass_fds=[descriptor], stdin=subprocess.PIPE,
            stdout=self._said, stderr=self._said, start_new_session=True,  # else Ctrl-C would end it before the run
        )  # fmt: skip

    def _keep(self) -> None:
        for life in range(1, LIVES + 1):
            self._process.wait()
            if self._ending or not self._answered:
                return
            if life < LIVES:
                self._process = self._start()
        self._lost(f"Prefect's temporary server died {LIVES} times{self._reason()}")

    def _reason(self) -> str:
        """The server's exit status and its last line of output."""
        self._said.seek(0)
        lines = [line.strip() for line in self._said.read().decode(errors="replace").splitlines() if line.strip()]
        code = self._process.poll()
        ended = "" if code is None else f" (exit status {code})"
        return f"{ended}: {lines[-1][:300]}" if lines else ended


def _serve(descriptor: int) -> None:
    import uvicorn

    threading.Thread(target=_leave_with_owner, daemon=True).start()
    config = uvicorn.Config("prefect.server.api.server:create_app", factory=True, log_level="error", lifespan="on")
    uvicorn.Server(config).run(sockets=[socket.socket(fileno=descriptor)])


def _leave_with_owner() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
