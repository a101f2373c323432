"""A campaign put into a mirror and brought to another folder: the same bytes, and nothing of either is lost."""

import json
import os
import shutil
from pathlib import Path

import pytest

from d3po_core.errors import D3POError
from d3po_core.mirror.known import finished_places
from d3po_core.mirror.layout import record_name, stage_copy, version_name
from d3po_core.mirror.lease import LeaseHeldError
from d3po_core.mirror.objects import open_objects
from d3po_core.mirror.putting import forget_round, is_mirrored
from d3po_core.mirror.state import DivergedError
from d3po_core.people.journal import raw_rows
from d3po_core.store.integrity import damages
from tests.core.mirror.campaigns import Machine, refuses_to_overwrite


@pytest.fixture
def two(tmp_path: Path, folder_mirror: str) -> tuple[Machine, Machine]:
    """Two machines; the first has begun round 1, mirrored it, and given the lease back."""
    first, second = Machine(tmp_path / "a", folder_mirror), Machine(tmp_path / "b", folder_mirror)
    first.begin()
    first.put()
    first.lease.release()
    return first, second


def test_stores_refuse_to_write_a_name_twice(mirror: str) -> None:
    refuses_to_overwrite(mirror)


def test_large_file_goes_up_in_parts_and_comes_back(mirror: str, tmp_path: Path) -> None:
    objects, big = open_objects(mirror, "c"), tmp_path / "big"
    big.write_bytes(os.urandom(17 << 20))
    assert objects.create_file("files/big", big)
    assert not objects.create_file("files/big", big)
    assert objects.fetch("files/big", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == big.read_bytes()


def test_another_folder_gets_the_same_bytes(mirror: str, tmp_path: Path) -> None:
    first, second = Machine(tmp_path / "a", mirror), Machine(tmp_path / "b", mirror)
    first.begin()
    first.sample()
    first.judge(1003)
    (first.folder / "target.json").write_text("{}")
    assert first.put().stages == 2
    assert first.put() == (0, False), "nothing is new"
    pulled = second.pull()
    assert pulled is not None
    assert (pulled.stages, pulled.entries, pulled.left_out) == (2, 1003, 1)
    assert second.files() == first.files()
    assert raw_rows(second.folder) == raw_rows(first.folder)
    assert not damages(second.folder), "what was left out of the mirror is not damage"
    assert second.pull() == (0, 0, 0, 0)


def test_images_are_mirrored_by_choice(folder_mirror: str, tmp_path: Path) -> None:
    first, second = (Machine(tmp_path / name, folder_mirror, mirror_images=True) for name in "ab")
    first.begin()
    first.sample()
    first.put()
    second.pull()
    image = "images/round=1/a.png"
    assert (second.folder / image).read_bytes() == (first.folder / image).read_bytes()


def test_overviews_are_always_mirrored(tmp_path: Path, folder_mirror: str) -> None:
    store = Machine(tmp_path / "a", folder_mirror).config.store
    names = ("images/round=1/contact_sheet.png", "images/round=1/grid.png", "images/round=1/r1-g0-m0.png")
    assert [is_mirrored(name, store) for name in names] == [True, True, False]


def test_both_sides_go_on_from_each_other(two: tuple[Machine, Machine]) -> None:
    first, second = two
    first.judge(2)
    first.put()
    first.lease.release()
    second.pull()
    second.sample()
    second.judge(3, first=2)
    (second.folder / "target.json").write_text("second")
    second.put()
    pulled = first.pull()
    assert pulled is not None
    assert (pulled.stages, pulled.entries) == (1, 3)
    assert first.files() == second.files()


def test_folder_that_is_ahead_keeps_its_own(two: tuple[Machine, Machine]) -> None:
    first, _ = two
    first.sample()
    first.judge(1)
    (first.folder / "target.json").write_text("newer")
    before = first.files()
    assert first.pull() == (0, 0, 0, 0)
    assert first.files() == before
    assert finished_places(first.folder) == [(1, 0), (1, 1)]


def test_diverged_folder_is_refused_and_unchanged(two: tuple[Machine, Machine]) -> None:
    first, second = two
    second.pull()
    second.sample(what="there")
    second.put()
    second.lease.release()
    first.sample(what="here")
    before = first.files()
    for step in (first.pull, first.put):
        with pytest.raises(DivergedError, match=r"round 1 of campaign 'c': stage sample in .* is not that in"):
            step()
    assert first.files() == before


def test_what_an_unfinished_stage_left_is_set_aside(two: tuple[Machine, Machine]) -> None:
    first, second = two
    second.pull()
    second.sample()
    second.put()
    table = first.folder / "samples/round=1/part.parquet"
    table.parent.mkdir(parents=True)
    table.write_text("half a stage")
    first.pull()
    assert table.read_text() == "sampled"
    assert (first.folder / ".set-aside/samples/round=1/part.parquet").read_text() == "half a stage"


def test_file_that_changed_on_both_sides_is_refused(two: tuple[Machine, Machine]) -> None:
    first, second = two
    (first.folder / "target.json").write_text("one")
    first.put()
    first.lease.release()
    second.pull()
    (second.folder / "target.json").write_text("two")
    second.put()
    (first.folder / "target.json").write_text("three")
    with pytest.raises(DivergedError, match=r"target.json: changed here and in the mirror"):
        first.pull()
    assert (first.folder / "target.json").read_text() == "three"


def test_judgements_that_part_are_refused(two: tuple[Machine, Machine]) -> None:
    first, second = two
    second.pull()
    second.judge(2)
    second.put()
    first.judge(1, first=7)
    with pytest.raises(D3POError, match="people judged here and elsewhere"):
        first.pull()
    assert len(raw_rows(first.folder)[0]) == 1


def test_two_campaigns_of_one_name_are_refused(two: tuple[Machine, Machine]) -> None:
    _, second = two
    second.begin()
    for step in (second.pull, second.put):
        with pytest.raises(D3POError, match="holds another campaign of the name 'c'"):
            step()


def test_second_writer_is_refused(two: tuple[Machine, Machine]) -> None:
    first, second = two
    first.put()
    second.pull()
    with pytest.raises(LeaseHeldError, match="is written from"):
        second.put()


def test_damaged_object_brings_nothing(two: tuple[Machine, Machine], tmp_path: Path) -> None:
    first, second = two
    first.sample()
    first.put()
    (path,) = (tmp_path / "m").glob("c/files/samples/*/*")
    path.write_text("bad")
    with pytest.raises(D3POError, match=r"is gone or damaged, and samples/round=1/part.parquet is needed"):
        second.pull()
    assert not (second.folder / "samples/round=1/part.parquet").exists()
    assert not (second.folder / "stages/round=1/sample.json").exists()


def test_damaged_file_is_not_put(two: tuple[Machine, Machine]) -> None:
    first, _ = two
    first.sample()
    (first.folder / "samples/round=1/part.parquet").write_text("bad")
    with pytest.raises(D3POError, match="is not what its stage wrote"):
        first.put()
    assert first.objects.get(record_name(1, "sample")) is None


def test_dropped_round_can_be_made_again(two: tuple[Machine, Machine]) -> None:
    first, _ = two
    first.sample()
    first.put()
    for folder in ("stages", "samples", "images"):
        shutil.rmtree(first.folder / folder)
    forget_round(first.folder, 1, first.objects, first.lease)
    first.begin()
    first.sample(what="again")
    assert first.put().stages == 2


@pytest.mark.parametrize("path", ["../outside", "/etc/passwd", "images/../../outside"])
def test_record_that_names_a_file_outside_the_campaign_is_refused(path: str) -> None:
    piece = {"sha256": "0", "bytes": 1, "object": "files/x"}
    record = {"format": 1, "round": 1, "stage": "sample", "record": "", "listed": "", "files": {path: piece}}
    with pytest.raises(D3POError, match="which lies outside the campaign"):
        stage_copy(json.dumps(record).encode(), "s3://b/c")


def test_old_versions_go_and_the_newest_counts(two: tuple[Machine, Machine]) -> None:
    first, second = two
    for n in range(8):
        (first.folder / "target.json").write_text(str(n))
        first.put()
    assert [entry.name for entry in first.objects.listed("versions/")] == [version_name(n) for n in range(5, 10)]
    second.pull()
    assert (second.folder / "target.json").read_text() == "7"
