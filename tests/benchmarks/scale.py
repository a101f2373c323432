"""The pieces from which docs/scale.md computes a large night: ``python tests/benchmarks/scale.py``.

Measures on this machine what the run's own machine does for every image: plan a round, take a shard through Ray, write
its files, write and read the tables. Sizes are those of Stable Diffusion 1.5 at 512 px with 20 steps. ``--images`` sets
how many images the planning and the tables have; what follows from that for more is the page's arithmetic.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, machine, show, spread, write_json
from sleeping_shards import sleeping_shards

from d3po_core.config import CampaignConfig
from d3po_core.config_values import load_config
from d3po_core.processes.engine import end_processes, run_job
from d3po_core.processes.parcel import keep_files
from d3po_core.sampling.job import round_members
from d3po_core.store.integrity import record_files
from d3po_core.store.tables import read_rows, table_from_rows, write_table

BATCH, STEPS, LATENT = 64, 20, (4, 64, 64)
TRAJECTORY_BYTES = (STEPS + 1) * int(np.prod(LATENT)) * 2 + STEPS * 4  # latents in half precision, log_probs
REPEATS = 3


def main() -> None:
    """Measure each piece, print it, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000, help="of the planned round and its tables (100000)")
    parser.add_argument("--png-bytes", type=int, default=450_000, help="of an image (450000)")
    parser.add_argument("--shards", type=int, default=12, help="to take through Ray, and to write (12)")
    arguments = parser.parse_args()
    before, results = machine(), {}
    with tempfile.TemporaryDirectory() as folder:
        config = _config(Path(folder), arguments.images)
        for name, measure in (("plan", _plan), ("tables", _tables), ("write", _write), ("Ray", _ray)):
            results[name] = measure(config, arguments)
            print(name, "; ".join(f"{key} {_shown(value)}" for key, value in results[name].items()), flush=True)
    write_json(RESULTS / "scale.json", vars(arguments), before, {"pieces": results})


def _shown(value: Any) -> str:
    return show(value, 2) if isinstance(value, dict) else f"{value:,.1f}"


def _config(folder: Path, images: int) -> CampaignConfig:
    sample = {"groups_per_round": images // 4, "group_size": 4, "batch_size": BATCH, "num_steps": STEPS}
    values = {"runs_dir": str(folder), "model": {"device": "cpu"}, "sample": sample, "compute": {"processes": 2}}
    config = load_config(values, "benchmark")
    config.folder.mkdir(parents=True)
    return config


def _times(work: Callable[[], Any]) -> dict[str, float]:
    found = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return spread(found)


def _plan(config: CampaignConfig, arguments: argparse.Namespace) -> dict[str, Any]:
    """Ids and seeds of all images; the run's machine and every worker compute them."""
    return {"seconds": _times(lambda: round_members(config, 1)), "images": arguments.images}


def _tables(config: CampaignConfig, arguments: argparse.Namespace) -> dict[str, Any]:
    members = [member for group in round_members(config, 1) for member in group]
    rows = [
        {"sample_id": m.sample_id, "group_id": m.group_id, "member": m.place, "prompt": m.seed.prompt,
         "split": "train", "seed": m.seed.noise_seed, "image_path": f"images/round=1/{m.sample_id}.png",
         "trajectory_path": f"trajectories/round=1/shard-{index // BATCH:04d}.safetensors",
         "trajectory_row": index % BATCH, "checkpoint": None}
        for index, m in enumerate(members)
    ]  # fmt: skip
    path = config.folder / "samples" / "round=1" / "part.parquet"
    return {
        "write, seconds": _times(lambda: write_table(config.folder, "samples", 1, table_from_rows("samples", rows))),
        "read, seconds": _times(lambda: read_rows(path)),
        "bytes": path.stat().st_size,
    }


def _write(config: CampaignConfig, arguments: argparse.Namespace) -> dict[str, Any]:
    """Shards as the run's machine keeps them (64 images, trajectories, rows), and their digests."""
    noise = np.random.default_rng(0).integers(0, 256, BATCH * TRAJECTORY_BYTES, dtype=np.uint8)
    rates = []
    for number in range(arguments.shards):
        files = {f"images/round=1/r1-g{number}-m{place}.png": noise[: arguments.png_bytes] for place in range(BATCH)}
        files |= {f"trajectories/round=1/shard-{number:04d}.safetensors": noise, f"rows-{number}": noise[:9000]}
        started = time.perf_counter()
        keep_files(config, 1, files)
        rates.append(sum(map(len, files.values())) / 1e6 / (time.perf_counter() - started))
    size = sum(map(len, files.values())) / 1e6
    started = time.perf_counter()
    record_files(config.folder, 1, "sample")
    listing = arguments.shards * size / (time.perf_counter() - started)
    return {"MB/s": spread(rates), "flush and digest at the stage's end, MB/s": listing, "MB per shard": round(size, 1)}


def _ray(config: CampaignConfig, arguments: argparse.Namespace) -> dict[str, Any]:
    """Bytes through Ray's object store to the run's machine, which does not write them."""
    plan = config.folder / "plan.json"
    plan.write_text(json.dumps({"seconds": 0, "bytes": 1}))
    run_job(sleeping_shards(8), config, 1, lambda _: None)
    size = BATCH * (TRAJECTORY_BYTES + arguments.png_bytes)
    rates = {}
    for name, count, per_shard in (("MB/s", arguments.shards, size), ("shards/s", 40 * arguments.shards, 1)):
        plan.write_text(json.dumps({"seconds": 0, "bytes": per_shard}))
        found = []
        for _ in range(REPEATS):
            started = time.perf_counter()
            run_job(sleeping_shards(count), config, 1, lambda _: None)
            found.append(count * (per_shard / 1e6 if per_shard > 1 else 1) / (time.perf_counter() - started))
        rates[name] = spread(found)
    end_processes()
    return rates


if __name__ == "__main__":
    main()
