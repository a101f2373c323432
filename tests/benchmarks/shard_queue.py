"""How busy the queue of shards keeps 64 workers that only wait as long as a shard takes; Ray on this machine.

    python tests/benchmarks/shard_queue.py [--workers 64] [--seconds 8.7] [--shards 10] [--bytes 4096]

A virtual worker sleeps for the seconds that a shard of 64 images takes on an H200 (64 / 7.36 images/s, eager) and
returns some bytes. Its share of time with a shard in its hands is what the queue is good for; the goal is 95 %. Start
and end of the workers do not count, as they live as long as the run.
"""

import argparse
import json
import tempfile
import time
from collections import Counter

from common import RESULTS, machine, write_json
from sleeping_shards import sleeping_shards

from d3po_core.config_values import load_config
from d3po_core.processes.engine import end_processes, run_job

GOAL = 0.95


def main() -> None:
    """Run the queue until all workers have started, then with the clock."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=8.7, help="that a shard takes (8.7)")
    parser.add_argument("--shards", type=int, default=10, help="shards per worker (10)")
    parser.add_argument("--bytes", type=int, default=4096, help="that a shard returns (4096)")
    arguments = parser.parse_args()
    before, started = machine(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        compute = {"processes": arguments.workers, "start_seconds": 900}
        config = load_config({"runs_dir": folder, "model": {"device": "cpu"}, "compute": compute}, "benchmark")
        config.folder.mkdir(parents=True)
        plan = config.folder / "plan.json"
        plan.write_text(json.dumps({"seconds": 0.5, "bytes": 1}))
        while len(set(run_job(sleeping_shards(2 * arguments.workers), config, 1, lambda _: None))) < arguments.workers:
            pass
        print(f"all workers there after {time.monotonic() - started:.1f} s", flush=True)
        plan.write_text(json.dumps({"seconds": arguments.seconds, "bytes": arguments.bytes}))
        started = time.monotonic()
        results = run_job(sleeping_shards(arguments.workers * arguments.shards), config, 1, lambda _: None)
        seconds = time.monotonic() - started
        end_processes()
    most = Counter(results).most_common(1)[0][1]
    busy = arguments.shards * arguments.seconds / seconds
    print(f"{arguments.workers} workers, {len(results)} shards of {arguments.seconds} s in {seconds:.1f} s: {busy:.1%} "
          f"busy (goal {GOAL:.0%}); the most shards of one worker: {most}")  # fmt: skip
    write_json(RESULTS / "shard_queue.json", vars(arguments), before, {"seconds": seconds, "busy": busy})


if __name__ == "__main__":
    main()
