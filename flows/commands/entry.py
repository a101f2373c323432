"""The program ``d3po``: Ctrl-C ends it without a traceback, also while Python imports."""

import signal
import sys
from typing import Any, NoReturn

INTERRUPTED = 130  # the exit status that shells expect after Ctrl-C

_pressed = False


def main() -> None:
    """Run the command line; nothing is imported before Ctrl-C is prepared for."""
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not in a script's background
    if ours:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing is open yet, so the process may just end
    from d3po.flows.commands.line import main as run

    if ours:
        signal.signal(signal.SIGINT, _interrupt)
    try:
        run()
    except (Exception, KeyboardInterrupt):
        if not _pressed:
            raise
        sys.exit(INTERRUPTED)  # a compiled module turns an interrupt of its import into an error of its own


def _interrupt(*_: Any) -> NoReturn:
    global _pressed
    _pressed = True
    raise KeyboardInterrupt
