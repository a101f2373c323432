"""Tell the training run once that people have finished a round; retry until it succeeds."""

import threading
from collections.abc import Callable
from pathlib import Path

from d3po_core.people.journal import Journal
from d3po_core.store.files import exclusive

OnComplete = Callable[[str, int], None]
NOTE = "told"


class Completion:
    """Calls ``on_complete(campaign, round_number)`` in the background.

    When the call returns, the journal notes it, so neither another server nor a restart repeats it. If a server dies
    during the call, nobody knows whether it came through, so it is repeated.

    Args:
        campaign: the campaign's folder.
        on_complete: the function to call.
        retry_seconds: how long to wait after it raised.
        lock: file in the campaign's folder that keeps a second caller out; calls that must not wait for each other use
            different ones.
    """

    def __init__(
        self, campaign: Path, on_complete: OnComplete, retry_seconds: float, lock: str = ".labels.lock"
    ) -> None:
        self._campaign, self._on_complete, self._retry_seconds = campaign, on_complete, retry_seconds
        self._lock_file = campaign / lock
        self._lock = threading.Lock()
        self._begun: set[str] = set()
        self.error: str | None = None
        self.ended = threading.Event()

    def begin(self, journal: Journal, sampling: str, round_number: int) -> None:
        """Make the call, unless it was made before or is under way."""
        with self._lock:
            if sampling in self._begun:
                return
            self._begun.add(sampling)
        threading.Thread(target=self._tell, args=(journal, sampling, round_number), daemon=True).start()

    def _tell(self, journal: Journal, sampling: str, round_number: int) -> None:
        while not self.ended.is_set():
            try:
                with exclusive(self._lock_file):
                    if journal.read_note(sampling, NOTE) is None:
                        self._on_complete(self._campaign.name, round_number)
                        journal.note(sampling, NOTE, "yes")
                self.error = None
                return
            except Exception as error:  # whatever the call raised: show it and retry
                self.error = f"{error or type(error).__name__}"
            self.ended.wait(self._retry_seconds)
