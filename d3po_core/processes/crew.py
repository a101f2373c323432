"""The run's workers: asked for one by one, used as soon as they are ready, replaced when they are lost."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from d3po_core import errors
from d3po_core.config import CampaignConfig
from d3po_core.devices import device_type
from d3po_core.processes.cluster import connect
from d3po_core.processes.parcel import bytes_of, digests, model_places, versions
from d3po_core.processes.worker import Event, Worker

LOG_LINES = 12

Kind = Literal["worker", "scorer"]


@dataclass(eq=False)
class Member:
    """A worker as the run sees it.

    Attributes:
        number: its place among the workers, which names its log.
        actor: Ray's handle.
        waiting: the reference to its next answer; None while it is idle.
        ready: whether it has been looked at and can work.
        node: its node's address, once known.
        hands: the items that it has.
        heard: when it last said something.
    """

    number: int
    actor: Any
    waiting: Any = None
    ready: bool = False
    node: str = "a node"
    pid: int = 0
    hands: list[int] = field(default_factory=list)
    heard: float = field(default_factory=time.monotonic)


class Crew:
    """Workers, one per GPU, that live until ``kill_all``.

    Args:
        config: says how many, and where they run.
        kind: workers, which have the campaign's model, or scorers.
    """

    def __init__(self, config: CampaignConfig, kind: Kind) -> None:
        import torch

        self.config, self.compute, self.kind = config, config.compute, kind
        self.private = self.compute.address is None
        self.on_gpus = device_type(config.model.device) == "cuda" if self.private else config.model.device != "cpu"
        everyone = self.compute.processes + config.scoring.gpus
        self.count = self.compute.processes if kind == "worker" else config.scoring.gpus
        self.ray = connect(self.compute, gpus=everyone if self.on_gpus else 0, cpus=2 * everyone)
        self._threads = max(1, torch.get_num_threads() // everyone)
        self._models = (
            {str(place): digests(place) for place in model_places(config).values()}
            if kind == "worker" and not self.private
            else {}
        )
        self._sent: dict[str, list[tuple[str, Any]]] = {}
        self.members: list[Member] = []
        # The last gang, and where it met: its group lasts while its members do.
        self.met: tuple[list[Member], tuple[str, int]] | None = None
        self.fill()

    def serves(self, config: CampaignConfig) -> bool:
        """Return whether these workers are those that a configuration asks for."""
        own = self.config
        return (own.compute, own.scoring, own.model.device, model_places(own)) == (
            config.compute, config.scoring, config.model.device, model_places(config)
        )  # fmt: skip

    def fill(self) -> None:
        """Ask for as many workers as are missing; those the cluster has no room for start when it has."""
        options: dict[str, Any] = {"num_gpus": 1} if self.on_gpus else {"num_cpus": 1}
        remote = self.ray.remote(Worker).options(max_concurrency=8, scheduling_strategy="SPREAD", **options)
        for number in sorted(set(range(self.count)) - {member.number for member in self.members}):
            actor = remote.remote(self._threads, str(self._log(number)) if self.private else None)
            self.members.append(Member(number, actor, actor.look.remote(self._models)))

    def _log(self, number: int) -> Path:
        folder = self.config.folder / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{self.kind}-{number}.log"

    def possible(self) -> int:
        """Return how many workers the cluster has room for at most, without waiting."""
        return min(self.count, int(self.ray.cluster_resources().get("GPU" if self.on_gpus else "CPU", 0)))

    def idle(self) -> list[Member]:
        """Return the workers that are ready and have no job."""
        return [member for member in self.members if member.ready and member.waiting is None]

    def begin(self, member: Member, order: dict[str, Any], files: list[tuple[str, Any]]) -> None:
        """Start a job on an idle worker."""
        member.heard = time.monotonic()
        member.actor.begin.remote(order, files)
        member.waiting = member.actor.events.remote()

    def wait(self, seconds: float) -> Iterator[tuple[Member, Event]]:
        """Wait for workers and yield what they say; ``lost`` comes with the reason, from one that is then gone.

        Raises:
            D3POError: a node has other versions or another model.
        """
        waiting = {member.waiting: member for member in self.members if member.waiting is not None}
        if not waiting:
            return
        ready, _ = self.ray.wait(list(waiting), num_returns=1, timeout=seconds)
        for ref in ready:
            member = waiting[ref]
            try:
                answer = self.ray.get(ref)
            except self.ray.exceptions.RayActorError as error:
                yield member, ("lost", self._lost(member, error))
                continue
            except self.ray.exceptions.RayError as error:
                yield member, ("lost", self._unread(member, error))
                continue
            member.heard = time.monotonic()
            if not member.ready:
                self._look(member, answer)
                continue
            over = any(kind in ("ended", "error") for kind, _ in answer)
            member.waiting = None if over else member.actor.events.remote()
            yield from ((member, event) for event in answer)
        for member in list(self.members):
            if member.ready and member.waiting and time.monotonic() - member.heard > self.compute.hang_seconds:
                self.kill(member)
                yield member, ("lost", f"{self.name(member)} said nothing for {self.compute.hang_seconds:g} s "
                               f"(compute.hang_seconds); {self.told_last(member)}")  # fmt: skip

    def _look(self, member: Member, found: dict[str, Any]) -> None:
        """Check a new worker's node, and send the models that it lacks."""
        if not found:  # it has got its models
            member.ready, member.waiting = True, None
            return
        member.node, member.pid = found["node"], found["pid"]
        own = versions()
        other = [f"{name} {found['versions'][name]} (here {own[name]})" for name in own
                 if own[name] != found["versions"][name]]  # fmt: skip
        if other:
            raise errors.D3POError(f"node {member.node} has {', '.join(other)}; install the same versions on all nodes")
        if found["differs"]:
            raise errors.D3POError(
                f"node {member.node}: {found['differs'][0]} has other files than here; copy the folder, or remove it "
                "there, and the run sends it"
            )
        if not found["lacks"]:
            member.ready, member.waiting = True, None
            return
        lacking = [(place, self._shipped(place), Path(place).is_file()) for place in found["lacks"]]
        member.waiting = member.actor.take_models.remote(lacking)

    def _shipped(self, place: str) -> list[tuple[str, Any]]:
        """Return references to a model's files, put into the object store once."""
        if place not in self._sent:
            root = Path(place).parent if Path(place).is_file() else Path(place)
            self._sent[place] = [(name, self.put(root / name)) for name in self._models[place]]
        return self._sent[place]

    def put(self, path: Path) -> Any:
        """Return a reference to a file's bytes, put into the object store now.

        Raises:
            RankError: there is no room, neither in memory nor on the disk.
        """
        try:
            return self.ray.put(bytes_of(path))
        except self.ray.exceptions.RayError as error:
            if full := full_store(error):
                raise errors.RankError(
                    f"{path.name} ({path.stat().st_size / 1e6:.0f} MB) cannot be sent: {full}"
                ) from None
            raise

    def name(self, member: Member) -> str:
        """Return what to call a worker in a message."""
        return f"{self.kind} {member.number} of {self.count} (process {member.pid} on {member.node})"

    def _lost(self, member: Member, error: Exception) -> str:
        self.members.remove(member)
        text = " ".join(str(error).split())
        node_died = "node has died" in text or "node died" in text or "node is dead" in text.lower()
        what = "was lost with its node" if node_died else "died"
        return f"{self.name(member)} {what}; {self.told_last(member)}"

    def _unread(self, member: Member, error: Exception) -> str:
        self.kill(member)
        if full := full_store(error):
            return f"{self.name(member)}: {full}"
        text = " ".join(str(error).split())[:300]
        return f"{self.name(member)} cannot be heard ({type(error).__name__}: {text}); {self.told_last(member)}"

    def told_last(self, member: Member) -> str:
        """Return where a worker's log is, with its last lines if it is on this machine."""
        if not self.private:
            return f"Ray's log on that node: worker-*-{member.pid}.err (ray logs)"
        log = self._log(member.number)
        lines = log.read_text(errors="replace").splitlines()[-LOG_LINES:] if log.exists() else []
        return f"its log {log} " + ("\n  ".join(["ends with:", *lines]) if lines else "is empty")

    def kill(self, member: Member) -> None:
        """End a worker at once."""
        self.members.remove(member)
        self.ray.kill(member.actor)

    def kill_all(self) -> None:
        """End all workers at once."""
        for member in list(self.members):
            self.kill(member)


def error_of(crew: Crew, member: Member, answer: dict[str, Any]) -> Exception:
    """Return the exception for a worker's ``error``."""
    if answer["kind"]:
        kind: Exception = getattr(errors, answer["kind"])(answer["text"])
        return kind
    text = full_store(answer["text"]) or answer["text"]
    return errors.RankError(f"{crew.name(member)} failed: {text}; {crew.told_last(member)}")


def full_store(error: Exception | str) -> str | None:
    """Return what to do if an error, or its text, says that Ray's object store is full, else None."""
    text = f"{type(error).__name__} {' '.join(str(error).split())}"
    if not any(word in text for word in ("ObjectStoreFull", "OutOfDisk", "Local disk is full")):
        return None
    return (
        "Ray's object store is full, and so is the disk that takes what has no room in memory; give the nodes more "
        "(ray start --object-store-memory, or free space in Ray's folder), or lower sample.batch_size"
    )
