"""One rank of a pool (pool.py), a process that runs jobs: ``python -m d3po_core.processes.worker``.

Jobs arrive as JSON lines on stdin. The worker answers on stdout with ``{"done": units}`` now and then, and at the end
with ``{"result": ...}`` or ``{"error": text, "kind": a class of d3po_core.errors, or null}``. All other output goes to
stderr, which is the rank's log. When stdin ends, as it does when the parent is killed, the process ends at once.
"""

import faulthandler
import importlib
import json
import os
import queue
import signal
import sys
import threading
import traceback
from datetime import timedelta
from typing import IO, Any

# For a rank that hangs; the pool notices a dead one. It is longer than any rank waits for a slower one.
PATIENCE = timedelta(hours=1)


def main(device: str) -> None:
    """Join the other ranks, on ``cuda`` or ``cpu``, and run jobs."""
    faulthandler.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of the terminal: the parent decides
    orders, answers = _take_pipes()
    jobs: queue.Queue[dict[str, Any]] = queue.Queue()
    threading.Thread(target=_listen, args=(orders, jobs), daemon=True).start()
    _join_ranks(device)
    while True:
        answer = _run(jobs.get(), answers)
        _give_back(device)
        _say(answers, answer)


def _take_pipes() -> tuple[IO[str], IO[str]]:
    """Move the pool's pipes to other descriptors, so that libraries cannot read from or print to them."""
    orders, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    return orders, answers


def _listen(orders: IO[str], jobs: queue.Queue[dict[str, Any]]) -> None:
    for line in orders:
        jobs.put(json.loads(line))
    os._exit(0)


def _join_ranks(device: str) -> None:
    """Make the process group that accelerate uses, and with it every policy of this process."""
    import torch
    from accelerate import PartialState

    port = int(os.environ["MASTER_PORT"])
    store = torch.distributed.TCPStore("127.0.0.1", port, is_master=False)  # type: ignore[attr-defined]
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    PartialState(cpu=device == "cpu", store=store, rank=rank, world_size=world_size, timeout=PATIENCE)


def _run(order: dict[str, Any], answers: IO[str]) -> dict[str, Any]:
    from d3po_core.config import CampaignConfig

    module, _, name = order["job"].partition(":")
    try:
        job = getattr(importlib.import_module(module), name)
        config = CampaignConfig.model_validate(order["config"])
        return {"result": job(config, order["round"], lambda count: _say(answers, {"done": count}))}
    except Exception as error:
        traceback.print_exc()
        kinds = [kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "d3po_core.errors"]
        return {"error": str(error) or type(error).__name__, "kind": next(iter(kinds), None)}


def _give_back(device: str) -> None:
    """Return the GPU memory that PyTorch keeps for its next pass: the parent's scorers need some of it now."""
    if device == "cuda":
        import torch

        torch.cuda.empty_cache()


def _say(answers: IO[str], answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


if __name__ == "__main__":
    main(sys.argv[1])
