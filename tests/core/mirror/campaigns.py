"""A small campaign that finishes stages by hand, and one machine's view of its mirror."""

from pathlib import Path
from typing import Any

import numpy as np

from d3po_core.config import CampaignConfig
from d3po_core.config_values import load_config
from d3po_core.mirror.holder import holder_of
from d3po_core.mirror.lease import Lease
from d3po_core.mirror.objects import Objects, open_objects
from d3po_core.mirror.pulling import Pulled, pull_campaign
from d3po_core.mirror.putting import Put, put_campaign
from d3po_core.people.journal import Journal, Submission
from d3po_core.records import LabelRecord
from d3po_core.store.campaign import begin_round, open_campaign
from d3po_core.store.images import save_png
from d3po_core.store.stages import finish_stage

RECORD = LabelRecord(ended="complete", groups_needed=1, groups_done=1, num_judgements=1, num_raters=1, waited_seconds=0)


def refuses_to_overwrite(url: str) -> Objects:
    """Check that a store keeps the first of two objects of one name; give its objects."""
    objects = open_objects(url, "c")
    assert objects.create("lease/1.json", b"one")
    assert not objects.create("lease/1.json", b"two")
    assert objects.get("lease/1.json") == b"one"
    assert objects.get("lease/2.json") is None
    assert [entry.name for entry in objects.listed("lease/")] == ["lease/1.json"]
    return objects


class Machine:
    """A folder on its own machine, with a mirror."""

    def __init__(self, runs: Path, url: str, **store: Any) -> None:
        values = {"campaign": "c", "runs_dir": str(runs), "store": {"mirror": url, "timeout_seconds": 5, **store}}
        self.config: CampaignConfig = load_config(values, "test")
        self.folder = self.config.folder
        self.folder.mkdir(parents=True)
        self.objects: Objects = open_objects(url, "c", self.config.store.timeout_seconds)
        self.lease = Lease(self.objects, holder_of(self.folder), "c", 60)

    def begin(self, number: int = 1) -> None:
        open_campaign(self.config)
        begin_round(self.config, number)

    def sample(self, number: int = 1, what: str = "sampled") -> None:
        def work() -> LabelRecord:
            save_png(np.zeros((8, 8, 3), dtype=np.uint8), self.folder / f"images/round={number}/a.png")
            table = self.folder / f"samples/round={number}/part.parquet"
            table.parent.mkdir(parents=True, exist_ok=True)
            table.write_text(what)
            return RECORD

        finish_stage(self.folder, number, "sample", LabelRecord, work)

    def judge(self, count: int, first: int = 0) -> None:
        journal = Journal(self.folder)
        for n in range(first, first + count):
            said = Submission(f"s{n}", "1", "ann", f"q{n}", 0, "answer", "mark_bad", ("a", "b"), (1.0, 0.0), 2.0)
            journal.append(said)
        journal.close()

    def put(self) -> Put:
        self.lease.take()
        return put_campaign(self.folder, self.config.store, self.objects, self.lease)

    def pull(self) -> Pulled | None:
        return pull_campaign(self.folder, self.config.store, self.objects)

    def files(self) -> dict[str, bytes]:
        """What the campaign keeps, without images, the journal, and what only concerns this machine."""
        paths = {path.relative_to(self.folder).as_posix(): path for path in sorted(self.folder.rglob("*"))}
        skipped = (".", "images", "labels")
        return {n: p.read_bytes() for n, p in paths.items() if p.is_file() and not n.startswith(skipped)}
