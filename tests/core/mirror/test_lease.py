"""The lease: one writer at a time, whatever the order of steps and however wrong the machines' clocks are."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from d3po_core.errors import D3POError
from d3po_core.mirror.layout import lease_name
from d3po_core.mirror.lease import Lease, LeaseHeldError, LeaseLostError
from tests.core.mirror.stores import VirtualStore

SECONDS = 30.0
HELD = r"is written from \S+@\S+ \(process \d+\) since 20.* take the campaign over after 2026-01-01 00:17:11 UTC"


def machines(count: int = 2, skews: tuple[float, ...] = (0.0, 0.0)) -> tuple[list[Lease], VirtualStore]:
    """Leases of several machines on one store; a machine's own clock is off by its skew."""
    store = VirtualStore({}, [1000.0])
    return [
        Lease(store, f"machine {n}", "c", SECONDS, clock=lambda n=n: store.clock[0] + skews[n]) for n in range(count)
    ], store


def test_second_machine_is_refused_with_who_and_since_when() -> None:
    (first, second), store = machines()
    assert first.take()
    assert not first.take(), "the same folder holds it already"
    store.clock[0] += SECONDS - 1
    with pytest.raises(LeaseHeldError, match=HELD):
        second.take()


def test_lease_that_ran_out_can_be_taken_over_and_its_writer_stops() -> None:
    (first, second), store = machines()
    first.take()
    store.clock[0] += SECONDS + 2.5
    assert second.take()
    with pytest.raises(LeaseLostError, match=r"is no longer written from here: .* took it over"):
        first.require()
    second.require()


def test_lease_that_was_given_back_is_free_at_once() -> None:
    (first, second), _ = machines()
    first.take()
    first.release()
    assert second.take()
    first.release()
    second.require()


def test_writer_whose_lease_ran_out_unnoticed_goes_on_with_it() -> None:
    (first, _), store = machines()
    first.take()
    store.clock[0] += 100 * SECONDS
    first.require()
    assert first.number == 2


def test_number_that_was_taken_and_deleted_meanwhile_gives_no_lease() -> None:
    (first, second), store = machines()
    first.take()
    newest = second.newest()
    assert newest is not None
    first._renewed_at -= SECONDS
    first.require()  # now number 2
    first._renewed_at -= SECONDS
    first.require()  # now number 3; 1 and 2 are deleted
    assert not second._create(newest.number + 1, SECONDS), "number 2 is free again, and still no lease"
    assert list(store.contents) == [lease_name(3)]


class Overwriting(VirtualStore):
    """A store that does not know conditions."""

    def create(self, name: str, content: bytes) -> bool:
        self.contents.pop(name, None)
        return super().create(name, content)


def test_store_that_overwrites_what_it_was_told_to_keep_is_refused() -> None:
    store = Overwriting({}, [1000.0])
    with pytest.raises(D3POError, match=r"^the mirror s3://virtual/c overwrites an object that it was told to keep"):
        Lease(store, "machine", "c", SECONDS).take()
    assert store.contents == {}, "nothing is left there"


class Switching(VirtualStore):
    """A store that lets other machines act before each request."""

    before: Any = None

    def _switch(self) -> None:
        if self.before:
            self.before()


for _name in ("create", "get", "listed", "delete", "modified"):

    def _wrapped(self: Switching, *args: Any, _name: str = _name) -> Any:
        self._switch()
        return getattr(VirtualStore, _name)(self, *args)

    setattr(Switching, _name, _wrapped)


@given(
    st.lists(st.tuples(st.integers(0, 1), st.sampled_from([0.0, 0.3, 2.0, 16.0, 31.9, 40.0, 90.0])), max_size=30),
    st.lists(st.sampled_from([None, 0, 1]), max_size=60),
    st.tuples(st.sampled_from([-1e6, 0.0, 3600.0]), st.sampled_from([-1e6, 0.0, 3600.0])),
)
def test_no_two_holders_ever_publish_at_the_same_time(
    turns: list[tuple[int, float]], inner: list[int | None], skews: tuple[float, float]
) -> None:
    """Random turns, waits and interleavings within a machine's own requests: holders never overlap.

    A holder may publish until its lease is over by the store's clock. Whoever takes the lease before that, while the
    other has not given it back, would be a second holder.
    """
    store = Switching({}, [1000.0])
    leases = [Lease(store, f"machine {n}", "c", SECONDS, lambda n=n: store.clock[0] + skews[n]) for n in range(2)]
    until, lost, busy = [0.0, 0.0], [False, False], [False, False]
    choices = iter(inner)

    def act(machine: int) -> None:
        if busy[machine] or lost[machine]:
            return
        busy[machine] = True
        try:
            leases[machine].require()
        except LeaseHeldError:
            pass
        except LeaseLostError:
            lost[machine] = True
        else:
            now, other = store.clock[0], 1 - machine
            # require() promises half of the lease for the put that follows it.
            assert until[other] <= now, f"{machine} may publish while {other} still may"
            until[machine] = now + SECONDS / 2
        finally:
            busy[machine] = False

    def interleave() -> None:
        if (other := next(choices, None)) is not None:
            act(other)

    store.before = interleave
    for machine, seconds in turns:
        store.clock[0] += seconds
        act(machine)
