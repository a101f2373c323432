"""A run and its mirror: a store that is away costs a line, a lost lease ends the run, people's judgements get there."""

import logging
import os
import time
from pathlib import Path

import pytest

from d3po.tasks import mirroring
from d3po.tasks.mirroring import Session, mirrored
from d3po.tasks.mirroring_people import put_judgements
from d3po.tasks.stage import progress
from d3po_core.errors import D3POError
from d3po_core.mirror.known import finished_places, mirrored_places
from d3po_core.mirror.layout import record_name
from d3po_core.mirror.lease import LeaseHeldError, LeaseLostError
from d3po_core.mirror.objects import Objects
from d3po_core.mirror.opening import push
from d3po_core.mirror.putting import put_campaign
from d3po_core.people.journal import raw_rows
from tests.core.mirror.campaigns import Machine


@pytest.fixture
def url(tmp_path: Path) -> str:
    (tmp_path / "m").mkdir()
    return f"file://{tmp_path / 'm'}"


def test_store_that_is_away_costs_one_line_and_gets_everything_later(
    url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(mirroring, "PAUSE", 0)
    machine = Machine(tmp_path / "a", url)
    machine.begin()
    with mirrored(machine.config):
        (tmp_path / "m").rename(tmp_path / "gone")
        (tmp_path / "m").write_text("no folder")
        for number in (1, 2):
            machine.begin(number)
            machine.sample(number)
            mirroring.deliver(machine.config)
        warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        assert len(warnings) == 1
        assert "the run goes on, and what is missing there is put later (or: d3po push)" in warnings[0]
        (tmp_path / "m").unlink()
        (tmp_path / "gone").rename(tmp_path / "m")
        mirroring.deliver(machine.config)
        assert "answers again and has everything" in caplog.text
    assert not set(finished_places(machine.folder)) - mirrored_places(machine.objects)


def test_new_campaign_does_not_begin_while_its_mirror_is_away(url: str, tmp_path: Path) -> None:
    machine = Machine(tmp_path / "a", url)
    (tmp_path / "m").rmdir()
    (tmp_path / "m").write_text("no folder")
    with pytest.raises(D3POError, match=r"is no folder; mount it|cannot be told whether it is new"):
        Session(machine.config).begin()


@pytest.mark.parametrize("paused", [False, True])
def test_run_that_lost_its_lease_stops_before_it_publishes(url: str, tmp_path: Path, paused: bool) -> None:
    first = Machine(tmp_path / "a", url, lease_seconds=1)
    other = Machine(tmp_path / "b", url)
    first.begin()
    session = Session(first.config)
    session.begin()
    session.leave()  # as a machine that is paused: nothing renews the lease
    first.sample()
    take_over(other, tmp_path / "m")
    session.lease._renewed_at += 1000 if paused else -1  # a clock that stood still says that the lease is its own
    with pytest.raises(LeaseLostError, match="is no longer written from here"):
        session.deliver()
    assert not other.objects.listed("records/")


def take_over(other: Machine, mirror: Path) -> None:
    for path in (mirror / "c/lease").iterdir():
        os.utime(path, (0, 0))  # by the store's clock, its time is over
    assert other.lease.take()


def test_record_is_not_put_if_the_lease_was_lost_while_its_files_were(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, other = Machine(tmp_path / "a", url), Machine(tmp_path / "b", url)
    first.begin()
    first.put()
    first.sample()
    create_file = Objects.create_file

    def overtaken(self: Objects, name: str, path: Path) -> bool:
        if not other.lease.number:
            take_over(other, tmp_path / "m")
        return create_file(self, name, path)

    monkeypatch.setattr(Objects, "create_file", overtaken)
    with pytest.raises(LeaseLostError, match="took it over"):
        put_campaign(first.folder, first.config.store, first.objects, first.lease)
    assert other.objects.get(record_name(1, "config"))
    assert not other.objects.get(record_name(1, "sample"))


def test_lost_lease_ends_a_stage_in_its_middle(url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, other = Machine(tmp_path / "a", url, lease_seconds=1), Machine(tmp_path / "b", url)
    first.begin()
    images: list[int] = []

    def long_stage() -> None:
        with mirrored(first.config), progress(first.config, 1, "sample", 1000, "image") as bar:
            bar.update()
            take_over(other, tmp_path / "m")
            for image in range(1000):
                bar.update()
                images.append(image)
                time.sleep(0.01)

    with pytest.raises(LeaseLostError, match=r"^campaign 'c' is no longer written from here: .* took it over"):
        long_stage()
    assert len(images) < 1000, "the stage does not go on to its end"
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING], "the run's end says it"


def test_run_gives_its_lease_back(url: str, tmp_path: Path) -> None:
    first, second = Machine(tmp_path / "a", url), Machine(tmp_path / "b", url)
    first.begin()
    with mirrored(first.config), pytest.raises(LeaseHeldError):
        second.lease.take()
    assert second.lease.take()


def test_push_leaves_a_running_runs_lease_alone(url: str, tmp_path: Path) -> None:
    first, second = Machine(tmp_path / "a", url), Machine(tmp_path / "b", url)
    first.begin()
    with mirrored(first.config):
        push(first.config)
        with pytest.raises(LeaseHeldError):
            second.lease.take()
    push(first.config)
    assert second.lease.take()


def test_judgements_get_there_without_a_run(url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second = Machine(tmp_path / "a", url), Machine(tmp_path / "b", url)
    first.begin()
    with mirrored(first.config):
        pass  # the run sleeps now
    put: dict[Path, tuple[object, ...]] = {}
    first.judge(3)
    put_judgements(tmp_path / "a", put, {})
    second.pull()
    assert raw_rows(second.folder) == raw_rows(first.folder)
    requests = len(first.objects.listed("versions/"))
    put_judgements(tmp_path / "a", put, {})
    assert len(first.objects.listed("versions/")) == requests, "nothing is new"
    said: dict[Path, str] = {}
    second.lease.take()  # another machine goes on
    first.judge(1, first=3)
    for _ in range(2):
        put_judgements(tmp_path / "a", put, said)
    told = [r for r in caplog.records if "judgements are kept here and put into the mirror later" in r.getMessage()]
    assert len(told) == 1
