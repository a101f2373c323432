"""How busy the queue of shards keeps 64 workers that only wait as long as a shard takes; Ray on this machine.

    python tests/benchmarks/shard_queue.py [--workers 64] [--seconds 6.1] [--shards 10]

A virtual worker sleeps for the seconds that a shard of 64 images takes on an H100 (64 / 10.5 images/s) and returns a
few bytes. Its share of time with a shard in its hands is what the queue is good for; the goal is 95 %. Start and end of
the workers do not count, as they live as long as the run.
"""

import argparse
import tempfile
import time
from collections import Counter

from common import RESULTS, machine, write_json

from d3po_core.config_values import load_config
from d3po_core.processes.engine import end_processes, run_job
from tests.tasks.rank_ends import squares_of

GOAL = 0.95


def main() -> None:
    """Run the queue once to start all workers, then with the clock."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=6.1)
    parser.add_argument("--shards", type=int, default=10, help="shards per worker")
    arguments = parser.parse_args()
    before = machine()
    with tempfile.TemporaryDirectory() as folder:
        compute = {"processes": arguments.workers, "start_seconds": 900}
        config = load_config({"runs_dir": folder, "model": {"device": "cpu"}, "compute": compute}, "benchmark")
        tenths = round(arguments.seconds * 10)
        while len({pid for _, pid in run_job(squares_of(2 * arguments.workers), config, 5, lambda _: None)}) < (
            arguments.workers
        ):
            pass
        started = time.monotonic()
        results = run_job(squares_of(arguments.workers * arguments.shards), config, tenths, lambda _: None)
        seconds = time.monotonic() - started
        end_processes()
    most = Counter(pid for _, pid in results).most_common(1)[0][1]
    busy = arguments.shards * tenths / 10 / seconds
    print(f"{arguments.workers} workers, {len(results)} shards of {tenths / 10} s in {seconds:.1f} s: {busy:.1%} busy "
          f"(goal {GOAL:.0%}); the most shards of one worker: {most}")  # fmt: skip
    write_json(RESULTS / "shard_queue.json", vars(arguments), before, {"seconds": seconds, "busy": busy})


if __name__ == "__main__":
    main()
