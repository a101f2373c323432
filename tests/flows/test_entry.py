"""Ctrl-C while the command line still imports."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

# Presses Ctrl-C when a module is imported; a compiled module turns that into an ImportError.
PROGRAM = """
import os, signal, sys
compiled, module = sys.argv.pop() == "compiled", sys.argv.pop()
class Press:
    def find_spec(self, name, *_):
        if name == module:
            try:
                os.kill(os.getpid(), signal.SIGINT)
                for _ in range(1000): pass
            except KeyboardInterrupt:
                if compiled:
                    raise ImportError("initialization failed") from None
                raise
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Press())
from d3po.flows.commands.entry import main
main()
"""


@pytest.mark.parametrize(
    ("module", "kind", "status"),
    [("typer", "python", -signal.SIGINT), ("uvicorn", "python", 130), ("uvicorn", "compiled", 130)],
)
def test_ctrl_c_while_something_is_imported_shows_no_traceback(
    module: str, kind: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("D3PO_DATA", str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "browse", "--port", "22190", module, kind], capture_output=True, text=True
    )
    assert done.returncode == status
    assert "Traceback" not in done.stderr
