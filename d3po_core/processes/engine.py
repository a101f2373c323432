"""Do jobs with a crew of workers: a queue that outlives lost workers, and gangs that start again without them."""

import atexit
import contextlib
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from d3po_core.config import CampaignConfig
from d3po_core.errors import RankError
from d3po_core.processes.cluster import disconnect
from d3po_core.processes.crew import Crew, Kind, Member, error_of
from d3po_core.processes.job import Job, QueueJob, Tell
from d3po_core.processes.parcel import keep_files, letter, pack
from d3po_core.store.leftovers import sweep_leftovers

IN_HAND = 2
LOOK_EVERY_SECONDS = 0.5
# A worker or an item that is lost so often in one stage has a cause that another try will not mend.
TRIES = 3
WRITERS = 4

_crews: dict[Kind, Crew] = {}
# Sampling and the scoring beside it run in two threads.
_starting = threading.Lock()


def run_job(job: Job, config: CampaignConfig, round_number: int, tell: Tell, kind: Kind = "worker") -> Any:
    """Do a job in this process, or on workers, and return its result.

    Without scorers on GPUs of their own, one process means this one.

    Args:
        job: the job.
        config: the campaign's configuration.
        round_number: the round.
        tell: called with the number of units done.
        kind: who does it: the ``compute.processes`` workers, or the ``scoring.gpus`` scorers.

    Raises:
        D3POError: an error that the user can fix.
        RankError: workers were lost too often, or failed in another way; a retry resumes from the files on disk.
    """
    if config.compute.processes == 1 and not config.scoring.gpus:
        return job.alone(config, round_number, tell)
    crew = _crew_for(config, kind)
    try:
        return (_Queue if isinstance(job, QueueJob) else _Gang)(crew, job, config, round_number, tell).run()
    except BaseException:
        crew.kill_all()
        if kind == "worker":  # scorers' files are written while others are
            sweep_leftovers(config.folder, round_number)
        raise


def _crew_for(config: CampaignConfig, kind: Kind) -> Crew:
    with _starting:
        if any(not crew.serves(config) for crew in _crews.values()):
            end_processes()
        if kind not in _crews:
            _crews[kind] = Crew(config, kind)
        return _crews[kind]


@atexit.register
def end_processes() -> None:
    """End the workers that ``run_job`` started."""
    crews = [*_crews.values()]
    _crews.clear()
    for crew in crews:
        crew.kill_all()
    if crews:
        disconnect(crews[0].ray)


@contextlib.contextmanager
def processes_end_here() -> Iterator[None]:
    """Let jobs start workers within this context, and end them all when it ends."""
    try:
        yield
    finally:
        end_processes()


class _Stage:
    """A job on a crew, with the files that its workers read."""

    def __init__(self, crew: Crew, job: Any, config: CampaignConfig, round_number: int, tell: Tell) -> None:
        self.crew, self.job, self.config, self.round, self.tell = crew, job, config, round_number, tell
        self.lost: list[str] = []
        crew.fill()

    def files(self) -> list[tuple[str, Any]]:
        """Return references to the files that a worker reads, put into the object store now."""
        parcel = pack(self.config, self.job.needs(self.config, self.round), getattr(self.job, "inputs", ()))
        return [(path, self.crew.put(place)) for path, place in parcel.items()]

    def order(self, **more: Any) -> dict[str, Any]:
        """Return what a worker is told to do."""
        return {"job": self.job.name, "letter": letter(self.config), "round": self.round, **more}

    def note_loss(self, reason: str) -> None:
        """Count a lost worker and ask for another.

        Raises:
            RankError: too many were lost.
        """
        self.lost.append(reason)
        if len(self.lost) > TRIES * self.crew.count:
            raise RankError(f"{len(self.lost)} workers were lost in one stage; the last: {reason}")
        self.crew.fill()

    def gather(self, count: int, at_least: int) -> None:
        """Wait until so many workers are idle; after ``compute.start_seconds``, ``at_least`` of them will do.

        Raises:
            RankError: there are fewer.
        """
        deadline = time.monotonic() + self.crew.compute.start_seconds
        while len(self.crew.idle()) < min(count, max(at_least, self.crew.possible())):
            if time.monotonic() > deadline:
                break
            for _, (kind, value) in self.crew.wait(LOOK_EVERY_SECONDS):
                if kind == "lost":
                    self.note_loss(value)
        found = len(self.crew.idle())
        if found < at_least:
            why = f"; the last that was lost: {self.lost[-1]}" if self.lost else ""
            raise RankError(
                f"{found} of {count} workers are ready after {self.crew.compute.start_seconds:g} s "
                f"(compute.start_seconds), of a cluster with room for {self.crew.possible()}; expected at least "
                f"{at_least}: add machines, or lower compute.processes, compute.min_processes or scoring.gpus{why}"
            )


class _Queue(_Stage):
    """Items that go to whoever is free."""

    def run(self) -> Any:
        """Do all items and return the job's result."""
        items = self.job.items(self.config, self.round)
        self.results: dict[int, Any] = {}
        self.todo, self.falls = deque(items), Counter[int]()
        self.open: set[Member] = set()
        files = self.files() if items else []
        with ThreadPoolExecutor(WRITERS, thread_name_prefix="keep") as pool:
            self.pool, self.writing = pool, deque[tuple[Future[None], dict[str, Any]]]()
            self.due = time.monotonic() + self.crew.compute.start_seconds
            while len(self.results) < len(items):
                self._employ(files)
                for member, event in self.crew.wait(0.0 if self._written() else LOOK_EVERY_SECONDS):
                    self._take(member, *event)
        for member in self.open:
            member.actor.give.remote([None])
        while any(member.waiting is not None for member in self.open & set(self.crew.members)):
            for member, event in self.crew.wait(LOOK_EVERY_SECONDS):
                self._take(member, *event)
        return self.job.finish([self.results[item] for item in items])

    def _employ(self, files: list[tuple[str, Any]]) -> None:
        """Give idle workers a share of what is to do."""
        for member in self.crew.idle():
            if self.todo:
                self.crew.begin(member, self.order(items=self._next(member)), files)
                self.open.add(member)
        if not self.open and self.todo and time.monotonic() > self.due:
            self.gather(self.crew.count, 1)

    def _next(self, member: Member) -> list[int]:
        items = [self.todo.popleft() for _ in range(min(IN_HAND - len(member.hands), len(self.todo)))]
        member.hands += items
        return items

    def _take(self, member: Member, kind: str, value: Any) -> None:
        if kind == "made":
            self._give_more(member, value["item"])
            writing = self.pool.submit(self.job.keep, self.config, self.round, value["files"])
            self.writing.append((writing, value))
        elif kind == "kept":
            keep_files(self.config, self.round, value)
        elif kind == "error":
            raise error_of(self.crew, member, value)
        elif kind == "lost":
            self._put_back(member, value)
        elif kind == "ended":
            self.open.discard(member)

    def _give_more(self, member: Member, item: int) -> None:
        member.hands.remove(item)
        if more := self._next(member):
            member.actor.give.remote(more)

    def _put_back(self, member: Member, reason: str) -> None:
        self.open.discard(member)
        for item in reversed(member.hands):
            self.falls[item] += 1
            if self.falls[item] == TRIES:
                raise RankError(f"item {item} of {self.job.name} was in the hands of {TRIES} lost workers; {reason}")
            self.todo.appendleft(item)
        self.note_loss(reason)
        for other in self.open:  # some may have nothing left to do
            if not other.hands and (more := self._next(other)):
                other.actor.give.remote(more)

    def _written(self) -> bool:
        """Take note of what is on disk; return whether something is being written."""
        while self.writing and (self.writing[0][0].done() or len(self.writing) > WRITERS):
            future, made = self.writing.popleft()
            future.result()
            self.results[made["item"]] = made["result"]
            self.tell(made["units"])
        return bool(self.writing)


class _Gang(_Stage):
    """Work that all members do together; when one is lost, the others start again from what was kept."""

    def run(self) -> Any:
        """Do the job, if need be several times, and return the first member's result."""
        at_least = min(self.crew.compute.min_processes, self.crew.count)
        self.units = 0
        for attempt in range(TRIES):
            self.gather(self.crew.count, at_least)
            members = sorted(self.crew.idle(), key=lambda member: member.number)
            try:
                return self._once(members)
            except _LostError as loss:
                self.crew.kill_all()  # the others wait for it in a collective
                sweep_leftovers(self.config.folder, self.round)
                if attempt == TRIES - 1:
                    raise RankError(str(loss)) from None
                self.note_loss(str(loss))

    def _once(self, members: list[Member]) -> Any:
        files, store = self.files(), self._meeting(members)
        for rank, member in enumerate(members):
            gang = {"rank": rank, "size": len(members), "store": store, "device": self.config.model.device,
                    "seconds": self.crew.compute.hang_seconds}  # fmt: skip
            self.crew.begin(member, self.order(gang=gang), files)
        left, result = set(members), None
        while left:
            for member, (kind, value) in self.crew.wait(LOOK_EVERY_SECONDS):
                if kind == "lost":
                    if member in left:
                        raise _LostError(value)
                    self.note_loss(value)
                elif kind == "error":
                    raise self._cause(member, value)
                elif kind == "told" and member is members[0]:
                    self.tell(value)
                elif kind == "kept" and member is members[0]:
                    self.job.keep(self.config, self.round, value)
                elif kind == "ended":
                    left.discard(member)
                    result = value if member is members[0] else result
        return result

    def _meeting(self, members: list[Member]) -> tuple[str, int]:
        """Return where the members meet: where the same ones met before, or a new place at the first one's."""
        if self.crew.met and self.crew.met[0] == members:
            return self.crew.met[1]
        ray, first = self.crew.ray, members[0]
        try:
            store = ray.get(first.actor.address.remote(), timeout=self.crew.compute.start_seconds)
        except ray.exceptions.RayError as error:
            raise _LostError(f"{self.crew.name(first)} cannot be asked ({type(error).__name__})") from None
        self.crew.met = (members, store)
        return self.crew.met[1]

    def _cause(self, member: Member, answer: dict[str, Any]) -> Exception:
        """Return the error, or the loss of another that made it fail."""
        if answer["kind"]:
            return error_of(self.crew, member, answer)
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline:
            for _, (kind, value) in self.crew.wait(LOOK_EVERY_SECONDS):
                if kind == "lost":
                    return _LostError(value)
                if kind == "error" and value["kind"]:
                    return error_of(self.crew, member, value)
        return error_of(self.crew, member, answer)


class _LostError(Exception):
    """A member of a gang is gone."""
