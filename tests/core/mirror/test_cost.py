"""A delivery costs as many requests and reads as many files in a late round as in an early one."""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from d3po_core.mirror import known, outside
from d3po_core.mirror.holder import holder_of
from d3po_core.mirror.known import finished_places, mirrored_places
from d3po_core.mirror.layout import STAGES, record_name
from d3po_core.mirror.lease import Lease
from d3po_core.mirror.objects import MirrorAwayError, Objects
from d3po_core.mirror.opening import push
from d3po_core.mirror.putting import put_campaign
from d3po_core.mirror.standing import REQUESTS_PER_STAGE
from d3po_core.mirror.state import STATE_FILE, read_state
from d3po_core.people.journal import raw_rows
from d3po_core.store.integrity import record_files
from tests.core.mirror.campaigns import Machine

_watched: list[tuple[Path, list[str]]] = []


def _note(event: str, values: tuple[Any, ...]) -> None:
    for folder, names in _watched:
        if event in ("open", "os.scandir", "os.listdir") and str(values[0]).startswith(str(folder)):
            names.append(f"{event} {str(values[0]).removeprefix(f'{folder}/')}")


sys.addaudithook(_note)


@contextmanager
def reads(folder: Path) -> Iterator[list[str]]:
    """The files that this process opens below a folder meanwhile, and the folders that it lists."""
    _watched.append((folder, []))
    try:
        yield _watched[-1][1]
    finally:
        _watched.pop()


def stages_of(machine: Machine, number: int) -> Iterator[str]:
    """Do a round of three stages; yield after each."""
    machine.begin(number)
    yield "config"
    machine.sample(number)
    judged(machine, number, "import")
    yield "sample"
    row = machine.folder / f"rounds/round={number}/part.parquet"
    row.parent.mkdir(parents=True)
    row.write_text("published")
    record_files(machine.folder, number, "publish")
    yield "publish"


def judged(machine: Machine, number: int, name: str) -> Path:
    """Judgements of a round that no stage has listed yet."""
    table = machine.folder / f"judgements/round={number}/{name}.parquet"
    table.parent.mkdir(parents=True, exist_ok=True)
    table.write_text(f"{name} {number}")
    return table


def put(machine: Machine) -> int:
    """Deliver with the lease that is held; gives the number of stages put."""
    return put_campaign(machine.folder, machine.config.store, machine.objects, machine.lease).stages


def finish_rounds(machine: Machine, rounds: range) -> None:
    for number in rounds:
        for _ in stages_of(machine, number):
            put(machine)


@pytest.fixture
def machine(tmp_path: Path, folder_mirror: str) -> Machine:
    """A machine that has delivered rounds 0 to 2."""
    found = Machine(tmp_path / "a", folder_mirror)
    finish_rounds(found, range(3))
    put(found)  # the version, without what the last stage lists
    return found


def cost(machine: Machine, number: int) -> list[tuple[dict[str, int], int]]:
    """Requests of each kind, and files and folders read, by the delivery after each stage of a round."""
    found = []
    for _ in stages_of(machine, number):
        before = machine.objects.requests.copy()
        with reads(machine.folder) as opened:
            put(machine)
        found.append((dict(machine.objects.requests - before), len(opened)))
    return found


def in_a_new_process() -> None:
    """Forget what only a process remembers."""
    for memory in (known._compared, outside._unlisted_then, outside._full_blocks):
        memory.clear()  # type: ignore[attr-defined]


def test_late_round_costs_what_an_early_one_does(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outside, "SETTLED_SECONDS", 0)  # each round is older than that where rounds take their time
    put(machine)
    early = cost(machine, 3)
    finish_rounds(machine, range(4, 40))
    put(machine)
    assert cost(machine, 40) == early
    assert all("put" in requests and files > 3 for requests, files in early), "the spies see something"
    assert read_state(machine.folder).records == [], "nor does what is noted on disk grow"
    assert sorted(mirrored_places(machine.objects)) == finished_places(machine.folder)


def test_estimate_of_a_stages_requests_is_what_it_costs(machine: Machine) -> None:
    machine.begin(3)
    put(machine)
    machine.sample(3)
    before = machine.objects.requests.copy()
    put(machine)
    assert dict(machine.objects.requests - before) == {"list": 3, "get": 2, "put": 2}, "a table and the record"
    assert REQUESTS_PER_STAGE == 3 + 2


def test_deleted_state_is_made_again_and_nothing_is_put_twice(machine: Machine) -> None:
    before, state = machine.objects.requests.copy(), read_state(machine.folder)
    (machine.folder / STATE_FILE).unlink()
    for process in (lambda: None, in_a_new_process):
        process()
        assert put(machine) == 0
    assert (machine.objects.requests - before)["put"] == 0
    found = read_state(machine.folder)
    assert (found.whole, found.records, found.files) == (2, [], state.files)


def test_state_of_an_earlier_version_is_read(machine: Machine) -> None:
    names = [record_name(number, STAGES[order]) for number, order in finished_places(machine.folder)]
    state = asdict(read_state(machine.folder)) | {"records": names}
    del state["whole"]
    (machine.folder / STATE_FILE).write_text(json.dumps(state))
    in_a_new_process()
    before = machine.objects.requests.copy()
    assert put(machine) == 0
    assert (machine.objects.requests - before)["get"] == 1, "the version; what is known is not compared again"


@pytest.mark.parametrize("gone", [(0, "publish"), (1, "sample"), (2, "config")])
def test_record_that_the_store_lost_is_put_again(machine: Machine, gone: tuple[int, str]) -> None:
    machine.objects.delete(record_name(*gone))
    in_a_new_process()
    assert put(machine) == 1
    finish_rounds(machine, range(3, 4))
    assert sorted(mirrored_places(machine.objects)) == finished_places(machine.folder)
    assert read_state(machine.folder).whole == 3


def test_what_another_machine_did_meanwhile_is_seen(machine: Machine, tmp_path: Path) -> None:
    other = Machine(tmp_path / "b", machine.objects.url)
    machine.lease.release()
    other.pull()
    other.lease.take()
    other.objects.delete(record_name(2, "publish"))
    other.lease.release()
    machine.lease.take()
    assert put(machine) == 1, "the same process asks the store again, since somebody else had the lease"


def test_term_lasts_until_another_machine_has_the_lease(machine: Machine, tmp_path: Path) -> None:
    other, term = Machine(tmp_path / "b", machine.objects.url), machine.lease.term
    again = Lease(machine.objects, holder_of(machine.folder), "c", 60)  # as a page of the same folder
    machine.lease.release()
    assert (again.take(), again.term) == (False, term)
    again.release()
    assert other.lease.take()
    other.lease.release()
    assert (again.take(), again.term == term) == (True, False)


def test_other_mirror_gets_everything(machine: Machine, tmp_path: Path) -> None:
    (tmp_path / "m2").mkdir()
    machine.judge(2)
    put(machine)
    store = machine.config.store.model_copy(update={"mirror": f"file://{tmp_path / 'm2'}"})
    machine.config = machine.config.model_copy(update={"store": store})
    assert push(machine.config)[0].stages == 9
    second = Machine(tmp_path / "b", str(store.mirror))
    second.pull()
    assert second.files() == machine.files()
    assert raw_rows(second.folder) == raw_rows(machine.folder)


def test_lost_reply_to_a_record_changes_nothing(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    create = Objects.create

    def cut_off(self: Objects, name: str, content: bytes) -> bool:
        create(self, name, content)
        if name.startswith("records/"):
            raise MirrorAwayError("the mirror does not answer in time")
        return True

    machine.begin(3)
    monkeypatch.setattr(Objects, "create", cut_off)
    with pytest.raises(MirrorAwayError):
        put(machine)
    monkeypatch.undo()
    assert put(machine) == 0
    assert read_state(machine.folder).knows((3, 0))


def test_late_judgement_of_a_finished_round_is_put(machine: Machine, tmp_path: Path) -> None:
    folder = judged(machine, 1, "import").parent
    os.utime(folder, (1, 1))
    put(machine)
    with reads(machine.folder) as opened:
        put(machine)
    assert f"os.listdir {folder.relative_to(machine.folder)}" not in opened, "what has not changed is not looked at"
    late = judged(machine, 1, "late")
    put(machine)
    second = Machine(tmp_path / "b", machine.objects.url)
    second.pull()
    assert (second.folder / late.relative_to(machine.folder)).read_text() == "late 1"


def test_full_blocks_of_the_journal_are_read_once(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outside, "JOURNAL_BLOCK", 4)
    read: list[int] = []

    def counted(campaign: Path, first: int = 0) -> Any:
        rows = raw_rows(campaign, first)
        read.append(len(rows[0]))
        return rows

    monkeypatch.setattr(outside, "raw_rows", counted)
    for first, count in ((0, 10), (10, 1), (11, 2)):
        machine.judge(count, first=first)
        put(machine)
    assert read == [10, 4, 6], "of the full blocks only the last entry, to know the journal again"
    second = Machine(tmp_path / "b", machine.objects.url)
    second.pull()
    assert raw_rows(second.folder) == raw_rows(machine.folder)


def test_journal_that_was_replaced_is_read_anew(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outside, "JOURNAL_BLOCK", 4)
    machine.judge(9)
    put(machine)
    for path in machine.folder.glob("labels.sqlite*"):
        path.unlink()
    machine.judge(7, first=100)
    put(machine)
    second = Machine(tmp_path / "b", machine.objects.url)
    second.pull()
    assert len(raw_rows(second.folder)[0]) == 7
