"""A worker: a Ray actor that has a GPU of its own and does jobs in a folder of its own, for as long as the run lasts.

The run's side starts a job (``begin``), gives it items (``give``) and asks for what happened (``events``), which waits
until something did. Models stay loaded from job to job. A worker never writes into the campaign.
"""

import contextlib
import faulthandler
import hashlib
import importlib
import os
import queue
import shutil
import tempfile
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

# A job with work on its device looks this often whether there is another item.
LOOK_EVERY_SECONDS = 0.02

Event = tuple[str, Any]


class Worker:
    """See the module's description; Ray makes it an actor.

    Args:
        threads: CPU threads of its computations.
        log: the file that gets all it prints; None for Ray's own log.
    """

    def __init__(self, threads: int, log: str | None) -> None:
        # Before torch is imported, which reads this once.
        os.environ |= {"OMP_NUM_THREADS": str(threads), "TRANSFORMERS_VERBOSITY": "error"}
        if log:
            stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(stream, 1)
            os.dup2(stream, 2)
        faulthandler.enable(2)
        self._folder = Path(tempfile.mkdtemp(prefix="d3po-worker-"))
        self._events: queue.Queue[Event] = queue.Queue()
        self._items: queue.Queue[int | None] = queue.Queue()
        self._shipped: dict[str, str] = {}
        # One thread for all jobs: cuDNN's choice of algorithms, seconds of trials, is kept per thread.
        self._jobs = ThreadPoolExecutor(1, thread_name_prefix="job")

    def look(self, models: dict[str, dict[str, str]]) -> dict[str, Any]:
        """Return where this worker runs, its versions, and how each model's place looks here.

        Args:
            models: the digests of the models' files, by their place on the run's machine.
        """
        import ray

        from d3po_core.processes.parcel import digests, versions

        context = ray.get_runtime_context()
        found = {place: digests(Path(place)) if Path(place).exists() else {} for place in models}
        return {
            "node": ray.util.get_node_ip_address(), "node_id": context.get_node_id(), "pid": os.getpid(),
            "versions": versions(),
            "lacks": [place for place in models if not found[place]],
            "differs": [place for place, wanted in models.items() if found[place] and found[place] != wanted],
        }  # fmt: skip

    def take_models(self, models: list[tuple[str, list[tuple[str, Any]], bool]]) -> None:
        """Get the models that this node lacks; one worker of a node writes them for all.

        Args:
            models: where each lies on the run's machine, its files' paths, each with a reference to its bytes, and
                whether it is one file.
        """
        for place, files, single in models:
            self._take_model(place, files, single)

    def _take_model(self, place: str, files: list[tuple[str, Any]], single: bool) -> None:
        import ray

        from d3po_core.store.files import exclusive

        session = Path(tempfile.gettempdir()) / f"d3po-models-{ray.get_runtime_context().get_job_id()}"
        # The whole path counts, since two models may have the same name.
        folder = session / hashlib.sha256(place.encode()).hexdigest()[:16]
        with exclusive(session / ".lock"):
            if not folder.exists():
                writing = folder.with_name(f".{folder.name}.tmp")
                shutil.rmtree(writing, ignore_errors=True)
                for path, ref in files:
                    (writing / path).parent.mkdir(parents=True, exist_ok=True)
                    (writing / path).write_bytes(ray.get(ref))
                writing.rename(folder)
        self._shipped[place] = str(folder / files[0][0] if single else folder)

    def address(self) -> tuple[str, int]:
        """Open the store at which a gang meets, on this node's address only; return host and port."""
        import ray

        from d3po_core.processes.ranks import open_store

        return open_store(ray.util.get_node_ip_address())

    def begin(self, order: dict[str, Any], files: list[tuple[str, Any]]) -> None:
        """Start a job in the thread of jobs.

        Args:
            order: ``job`` (its name), ``letter`` (the configuration), ``round``, ``gang`` (see ``ranks.join``) or
                ``items``.
            files: the files that the job reads, each with a reference to its bytes.
        """
        self._items = queue.Queue()
        self.give(order.get("items", []))
        self._jobs.submit(self._do, order, files)

    def give(self, items: list[int | None]) -> None:
        """Give the running job more items; None is the last."""
        for item in items:
            self._items.put(item)

    def events(self) -> list[Event]:
        """Wait for events and return all there are; ``ended`` and ``error`` are a job's last."""
        found = [self._events.get()]
        with contextlib.suppress(queue.Empty):
            while True:
                found.append(self._events.get_nowait())
        return found

    def _do(self, order: dict[str, Any], files: list[tuple[str, Any]]) -> None:
        try:
            result = self._run(order, files)
            self._events.put(("ended", result))
        except BaseException as error:
            traceback.print_exc()
            kinds = [kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "d3po_core.errors"]
            text = str(error) or type(error).__name__
            self._events.put(("error", {"text": text, "kind": next(iter(kinds), None)}))

    def _run(self, order: dict[str, Any], files: list[tuple[str, Any]]) -> Any:
        import ray

        from d3po_core.processes.job import GangJob, QueueJob
        from d3po_core.processes.parcel import read_letter, unpack, without_copies
        from d3po_core.processes.ranks import free_memory, join

        folder = self._folder / "campaign"
        unpack(folder, dict(zip((path for path, _ in files), ray.get([ref for _, ref in files]), strict=True)))
        config = read_letter(order["letter"], folder, self._shipped)
        module, _, name = order["job"].partition(":")
        job: QueueJob | GangJob = getattr(importlib.import_module(module), name)
        if isinstance(job, GangJob):
            join(order["gang"])
            kept = lambda paths: self._keep(folder, paths)  # noqa: E731
            result = job.run(config, order["round"], lambda count: self._events.put(("told", count)), kept)
        else:
            result = None
            for made in job.make(config, order["round"], self._in_hand()):
                self._events.put(("made", vars(made) | {"files": without_copies(made.files)}))
        self._keep(folder, ["memory.json"])
        free_memory()
        return result

    def _in_hand(self) -> Iterator[int | None]:
        """Yield the items as they come, and None if there is none now."""
        while True:
            try:
                item = self._items.get(timeout=LOOK_EVERY_SECONDS)
            except queue.Empty:
                yield None
                continue
            if item is None:
                return
            yield item

    def _keep(self, folder: Path, paths: list[str]) -> None:
        from d3po_core.processes.parcel import bytes_of, files_below

        if files := files_below(folder, paths):
            self._events.put(("kept", {path: bytes_of(folder / path) for path in files}))
