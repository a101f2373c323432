"""Shards that only take time: a worker sleeps as long as a measured shard takes and returns as many bytes as asked."""

import json
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from d3po_core.config import CampaignConfig
from d3po_core.processes.job import Made, QueueJob


def _make(config: CampaignConfig, round_number: int, items: Iterable[int | None]) -> Iterator[Made]:
    plan = json.loads((Path(config.folder) / "plan.json").read_text())
    for item in items:
        if item is not None:
            time.sleep(plan["seconds"])
            yield Made(item, 1, {f"{item}.bin": bytes(plan["bytes"])}, os.getpid())


def sleeping_shards(count: int) -> QueueJob:
    """Return a job of so many shards, as the campaign's ``plan.json`` says; its result is who did each."""
    return QueueJob(
        name="tests.benchmarks.sleeping_shards:SLEEPING",
        items=lambda config, round_number: list(range(count)),
        needs=lambda config, round_number: ["plan.json"],
        inputs=(),
        make=_make,
        keep=lambda config, round_number, files: None,
        finish=list,
    )


SLEEPING = sleeping_shards(0)
