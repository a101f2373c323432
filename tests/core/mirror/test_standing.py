"""What a mirror costs per round, and images of the guideline in it."""

from pathlib import Path

import numpy as np

from d3po_core.mirror.standing import standing
from d3po_core.store.images import save_png
from tests.core.mirror.campaigns import Machine
from tests.core.mirror.stores import VirtualStore


def test_costs_of_a_round_are_the_mean_of_published_ones(tmp_path: Path, folder_mirror: str) -> None:
    machine = Machine(tmp_path / "a", folder_mirror)
    names = [
        "records/round=0/publish.json", "files/rounds/round=0/part.aa.parquet",  # the base counts to no round
        "records/round=1/judge.json", "records/round=1/publish.json", "files/rounds/round=1/part.bb.parquet",
        "records/round=2/publish.json", "files/rounds/round=2/part.cc.parquet", "files/samples/round=2/part.d.parquet",
        "records/round=3/judge.json", "files/samples/round=3/part.ee.parquet",  # not published yet
    ]  # fmt: skip
    machine.objects = VirtualStore(dict.fromkeys(names, (b"x" * 10, 0.0)), [0.0])
    found = standing(machine.folder, machine.objects, machine.lease)
    # Six objects in two rounds; three stages with five requests each besides the puts.
    assert (found["objects_per_round"], found["bytes_per_round"], found["requests_per_round"]) == (3, 30, 10)


def test_mirror_without_a_published_round_tells_no_costs(tmp_path: Path, folder_mirror: str) -> None:
    machine = Machine(tmp_path / "a", folder_mirror)
    machine.begin()
    machine.put()
    assert standing(machine.folder, machine.objects, machine.lease)["requests_per_round"] is None


def test_guideline_images_are_mirrored_and_others_are_not(tmp_path: Path, folder_mirror: str) -> None:
    first, second = Machine(tmp_path / "a", folder_mirror), Machine(tmp_path / "b", folder_mirror)
    people = first.config.judge.people.model_copy(update={"guideline": "![good](examples/hand.png) ![x](../x.png)"})
    judge = first.config.judge.model_copy(update={"people": people})
    first.config = first.config.model_copy(update={"judge": judge})
    first.begin()
    for name in ("examples/hand.png", "examples/other.png", "../x.png"):
        save_png(np.zeros((8, 8, 3), dtype=np.uint8), first.folder / name)
    first.put()
    second.pull()
    assert sorted(path.name for path in (tmp_path / "b").rglob("*.png")) == ["hand.png"]
    assert (second.folder / "examples/hand.png").read_bytes() == (first.folder / "examples/hand.png").read_bytes()
