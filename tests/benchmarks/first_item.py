"""A job whose items say when they were begun, to time the start of workers."""

import time
from collections.abc import Iterable, Iterator

from d3po_core.config import CampaignConfig
from d3po_core.processes.job import Made, QueueJob


def _make(config: CampaignConfig, round_number: int, items: Iterable[int | None]) -> Iterator[Made]:
    for item in items:
        if item is not None:
            yield Made(item, 1, result=time.time())


FIRST_ITEM = QueueJob(
    name="tests.benchmarks.first_item:FIRST_ITEM",
    items=lambda config, round_number: [0],
    needs=lambda config, round_number: [],
    inputs=(),
    make=_make,
    keep=lambda config, round_number, files: None,
    finish=lambda times: times[0],
)
"""One item that does nothing; its result is the time at which it was begun."""
