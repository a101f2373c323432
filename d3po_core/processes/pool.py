"""Run jobs on several processes, one per GPU, which start when first needed and end with the run.

This side only supervises: it hands out jobs, passes on progress, and takes the first rank's result. When a rank dies or
fails, the others could wait for it forever in a collective. So the pool kills them at once, and the next job starts new
ones. A rank whose parent dies ends by itself (worker.py). All sockets are on the loopback interface.
"""

import atexit
import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Protocol

import psutil
import torch

from d3po_core import errors
from d3po_core.config import CampaignConfig, ModelConfig
from d3po_core.devices import device_type
from d3po_core.paths import python_path
from d3po_core.processes.job import Job, Tell
from d3po_core.store.files import disk_errors
from d3po_core.store.leftovers import sweep_leftovers

LOOPBACK = "127.0.0.1"
LOOK_EVERY_SECONDS = 0.5
# A rank's death makes others fail. Wait this long for a dead rank before blaming the one that reported an error.
CAUSE_SECONDS = 1.0
LEAVE_SECONDS = 5.0
LOG_LINES = 12

Answer = dict[str, Any] | None


class Rank:
    """A worker process and its log; its answers go into the pool's queue, then None when it ends."""

    def __init__(self, number: int, log: Path, command: list[str], environment: dict[str, str]) -> None:
        self.number, self.log = number, log
        with log.open("ab") as stream:
            self._log_start = stream.tell()
            self.process = subprocess.Popen(
                command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stream, text=True
            )

    def listen(self, answers: "queue.Queue[tuple[Rank, Answer]]") -> None:
        """Put the process's answers into a queue, from a thread."""

        def read(stream: IO[str]) -> None:
            with stream, contextlib.suppress(ValueError):  # a killed process may leave half a line
                for line in stream:
                    answers.put((self, json.loads(line)))
            answers.put((self, None))

        threading.Thread(target=read, args=(self.process.stdout,), daemon=True).start()

    def ask(self, order: dict[str, Any]) -> None:
        """Send a job to the process; its death is noticed elsewhere."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()

    def end(self, patience: float) -> None:
        """Let the process end, or kill it after ``patience`` seconds."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(patience)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def told_last(self) -> str:
        """Return the log's path and its last lines since the process began."""
        with self.log.open("rb") as stream:
            stream.seek(self._log_start)
            lines = stream.read().decode(errors="replace").splitlines()[-LOG_LINES:]
        return f"its log {self.log} " + ("\n  ".join(["ends with:", *lines]) if lines else "is empty")


class RankPool:
    """Worker processes that have joined each other.

    Args:
        processes: how many.
        device: ``cuda``: each rank takes the GPU of its number; ``cpu``: the ranks share this process's threads.
        logs: folder of their logs, ``rank-<number>.log``.
    """

    def __init__(self, processes: int, device: str, logs: Path) -> None:
        with disk_errors(logs):
            logs.mkdir(parents=True, exist_ok=True)
        # The ranks meet at this store. If it opened its own port, it would listen on all interfaces.
        listener = socket.create_server((LOOPBACK, 0))
        port = listener.getsockname()[1]
        self._store = torch.distributed.TCPStore(  # type: ignore[attr-defined]
            LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )
        command = [sys.executable, "-P", "-m", "d3po_core.processes.worker", device]
        self._answers: queue.Queue[tuple[Rank, Answer]] = queue.Queue()
        self.ranks: list[Rank] = []
        for number in range(processes):
            log = logs / f"rank-{number}.log"
            self.ranks.append(Rank(number, log, command, _environment(number, processes, port)))
        for rank in self.ranks:
            rank.listen(self._answers)

    @property
    def alive(self) -> bool:
        """Return whether all ranks are running."""
        return all(rank.process.poll() is None for rank in self.ranks)

    def run(self, job: Job, config: CampaignConfig, round_number: int, tell: Tell) -> Any:
        """Run a job on all ranks; ``tell`` gets every rank's units. After any exception no rank is left.

        Raises:
            D3POError: a rank met an error that the user can fix.
            RankError: a rank died, or failed in another way.
        """
        name = f"{job.__module__}:{job.__qualname__}"
        order = {"job": name, "config": config.model_dump(mode="json"), "round": round_number}
        try:
            for rank in self.ranks:
                rank.ask(order)
            results: dict[int, Any] = {}
            while len(results) < len(self.ranks):
                rank, answer = self._next()
                if answer is None or "error" in answer:
                    raise self._failure(rank, answer)
                if "done" in answer:
                    tell(answer["done"])
                else:
                    results[rank.number] = answer["result"]
            return results[0]
        except BaseException:
            self.kill()
            sweep_leftovers(config.folder, round_number)  # a rank may have been writing
            raise

    def _next(self) -> tuple[Rank, Answer]:
        while True:
            with contextlib.suppress(queue.Empty):
                return self._answers.get(timeout=LOOK_EVERY_SECONDS)
            for rank in self.ranks:
                if rank.process.poll() is not None:
                    return rank, None

    def _failure(self, rank: Rank, answer: Answer) -> Exception:
        """Return the exception for the first rank that ended or answered with an error."""
        if answer and answer["kind"]:
            return getattr(errors, answer["kind"])(answer["error"])
        deadline = time.monotonic() + CAUSE_SECONDS
        while self.alive and time.monotonic() < deadline:
            time.sleep(0.05)
        dead = [rank for rank in self.ranks if rank.process.poll() is not None]
        if not dead and answer:
            return errors.RankError(f"{self._name(rank)} failed: {answer['error']}; {rank.told_last()}")
        told = [f"{self._name(rank)} {_end_of(rank.process.returncode)}; {rank.told_last()}" for rank in dead or [rank]]
        return errors.RankError("\n".join(told))

    def _name(self, rank: Rank) -> str:
        return f"rank {rank.number} of {len(self.ranks)}"

    def kill(self) -> None:
        """Kill all ranks at once."""
        for rank in self.ranks:
            rank.process.kill()
        self.close(patience=LEAVE_SECONDS)

    def close(self, patience: float = LEAVE_SECONDS) -> None:
        """Let the ranks end; kill those that take longer than ``patience`` seconds."""
        for rank in self.ranks:
            rank.end(patience)


class Pool(Protocol):
    """Processes that run jobs together until they are closed."""

    @property
    def alive(self) -> bool:
        """Return whether all processes are running."""
        ...

    def run(self, job: Job, config: CampaignConfig, round_number: int, tell: Tell) -> Any:
        """Run a job on all processes; return the first one's result. After any exception none is left."""
        ...

    def close(self) -> None:
        """End the processes."""
        ...


# ``model.launcher`` -> what starts the processes: takes their number, cuda or cpu, and a folder for logs.
LAUNCHERS: dict[str, Callable[[int, str, Path], Pool]] = {"local": RankPool}

_pools: dict[tuple[str, int, str, Path], Pool] = {}


def check_launcher(config: ModelConfig) -> None:
    """Check that the launcher exists.

    Raises:
        D3POError: it does not; the message lists those that do.
    """
    if config.launcher not in LAUNCHERS:
        raise errors.D3POError(f"model.launcher is {config.launcher!r}; expected one of {', '.join(LAUNCHERS)}")


def run_job(job: Job, config: CampaignConfig, round_number: int, tell: Tell) -> Any:
    """Run a job in this process, or on ``model.processes`` of them, and return its result.

    Raises:
        D3POError: an error that the user can fix.
        RankError: one of several processes died, or failed in another way; a retry resumes from the files on disk.
    """
    processes = config.model.processes
    if processes == 1:
        return job(config, round_number, tell)
    key = (config.model.launcher, processes, device_type(config.model.device), config.folder / "logs")
    if key not in _pools or not _pools[key].alive:
        end_ranks()
        check_launcher(config.model)
        _pools[key] = LAUNCHERS[config.model.launcher](*key[1:])
    return _pools[key].run(job, config, round_number, tell)


@atexit.register
def end_ranks() -> None:
    """End the processes that ``run_job`` started."""
    while _pools:
        _pools.popitem()[1].close()


@contextlib.contextmanager
def ranks_end_here() -> Iterator[None]:
    """Let jobs start processes within this context, and end them all when it ends."""
    try:
        yield
    finally:
        end_ranks()


def _environment(number: int, processes: int, port: int) -> dict[str, str]:
    """Return a rank's environment, from which torch and accelerate read its rank and the world size."""
    place = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    threads = max(1, torch.get_num_threads() // processes)
    loopback = next((n for n, found in psutil.net_if_addrs().items() if found and found[0].address == LOOPBACK), None)
    sockets = {"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback} if loopback else {}
    return {
        "TRANSFORMERS_VERBOSITY": "error", **sockets, **os.environ, **{key: str(value) for key, value in place.items()},
        "PYTHONPATH": python_path(), "MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(port), "OMP_NUM_THREADS": str(threads),
    }  # fmt: skip


def _end_of(returncode: int | None) -> str:
    if returncode is None:
        return "stopped answering"
    if returncode < 0:
        return f"was ended by {signal.Signals(-returncode).name}"
    return f"ended with exit code {returncode}"
