"""Sampling and training on several GPUs, one process each: images/s, pair-steps/s, and their ratios to one process.

    python tests/benchmarks/gpu_processes.py                    1, 2 and 4 processes; needs as many GPUs
    python tests/benchmarks/gpu_processes.py --device cpu       the embedded model on CPU processes: only that it works

Through the same engine (Ray) and jobs as a round. On GPUs Stable Diffusion's architecture with random weights, 512 px,
20 steps, guidance 5, LoRA rank 4. The work is the same for every number of processes; with the defaults an update's
passes are little less than a multiple of what four ranks take at once. Sampling is timed from the job's start to its
end, with files; training by its updates' seconds. The first turn of each is not counted: it loads and compiles. The
start of the workers is told apart: the seconds until the first of them begins an item.

It needs torch, diffusers, peft, transformers, accelerate, pyarrow, pydantic, duckdb and ray, but no server's packages.
"""

import argparse
import itertools
import math
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from common import RESULTS, machine, show, spread, write_json
from first_item import FIRST_ITEM
from random_models import random_pipeline

from d3po_core.config import CampaignConfig
from d3po_core.config_values import load_config
from d3po_core.models.loading import DTYPES
from d3po_core.processes.engine import end_processes, run_job
from d3po_core.sampling.job import SAMPLE, round_shards
from d3po_core.store.campaign import begin_round, open_campaign
from d3po_core.store.tables import partition, read_rows, table_from_rows, write_table
from d3po_core.training.job import TRAIN

GOALS = {2: {"sampling": 1.9, "training": 1.9}, 4: {"sampling": 3.8, "training": 3.8}}
GROUP_SIZE, UPDATES = 2, 2
Results = dict[str, Any]


def main() -> None:
    """Measure every number of processes, print ratios to one, write JSON."""
    arguments = _arguments()
    gpus = torch.cuda.device_count() if arguments.device == "cuda" else 0
    before = machine() | {"gpu": torch.cuda.get_device_name() if gpus else None, "gpus": gpus}
    results: Results = {}
    with tempfile.TemporaryDirectory() as folder:
        model = _model(arguments, Path(folder))
        for processes in arguments.processes:
            if arguments.device == "cuda" and processes > gpus:
                print(f"{processes} processes: left out, there are {gpus} GPUs", flush=True)
                continue
            # In a process of its own: what one process keeps on the first GPU would be missing to a worker there.
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as own:
                results[str(processes)] = own.submit(measure, arguments, model, processes, Path(folder)).result()
            write_json(arguments.output, vars(arguments), before, {"processes": results})
    report(results)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--processes", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2, 4], help="how many (1,2,4)"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="where (cuda)")
    parser.add_argument("--batch", type=int, default=32, help="images, or image-steps of training, at once (32)")
    parser.add_argument("--shards", type=int, default=16, help="batches of images to sample (16)")
    parser.add_argument("--groups", type=int, default=64, help="groups of two to train on (64)")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps (20)")
    parser.add_argument("--repeats", type=int, default=2, help="turns that are counted (2)")
    parser.add_argument("--precision", choices=("bf16", "fp16"), default="fp16", help="on GPUs (fp16)")
    parser.add_argument("--no-compile", action="store_true", help="without compilation")
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu_processes.json", help="JSON file")
    return parser.parse_args()


def _model(arguments: argparse.Namespace, folder: Path) -> Results:
    """The section ``model``: the embedded one on CPUs, else random weights that every process reads from disk."""
    if arguments.device == "cpu":
        return {"device": "cpu", "lora_rank": 4}
    precision = arguments.precision
    random_pipeline("sd15", DTYPES[precision], "cpu").save_pretrained(folder / "model")
    return {
        "device": "cuda", "path": str(folder / "model"), "lora_rank": 4, "precision": precision,
        "compile": not arguments.no_compile,
    }  # fmt: skip


def measure(arguments: argparse.Namespace, model: Results, processes: int, folder: Path) -> Results:
    """Rates of one number of processes."""
    turns: dict[str, list[float]] = {"sampling": [], "training": []}
    first: dict[str, float] = {}
    try:
        for turn in range(-1, arguments.repeats):
            sizes = _first_turn(arguments, processes) if turn < 0 else arguments
            config = _campaign(sizes, model, processes, folder / "runs", f"{processes}-{turn + 1}")
            if turn < 0:
                began = time.time()
                first["start"] = run_job(FIRST_ITEM, config, 1, lambda count: None) - began
            for name, work in (("sampling", _sample), ("training", _train)):
                started = time.perf_counter()
                rate = work(config, sizes)
                if turn < 0:
                    first[name] = time.perf_counter() - started
                else:
                    turns[name].append(rate)
    finally:
        end_processes()
    rates = {name: spread(values) for name, values in turns.items()}
    shown = f"sampling {show(rates['sampling'], 2)} images/s, training {show(rates['training'], 1)} pair-steps/s"
    start = first.pop("start")
    print(f"{processes} processes: start {start:.1f} s; {shown}; first turns {sum(first.values()):.0f} s", flush=True)
    return {**rates, "start, seconds": start, "first turn, seconds": first}


def _first_turn(arguments: argparse.Namespace, processes: int) -> argparse.Namespace:
    """Sizes of the turn that is not counted: no more work for a process than it has when there are the most of them."""
    share = processes / max(arguments.processes)
    sizes = {name: math.ceil(getattr(arguments, name) * share) for name in ("shards", "groups")}
    return argparse.Namespace(**vars(arguments) | sizes)


def _campaign(arguments: argparse.Namespace, model: Results, processes: int, runs: Path, name: str) -> CampaignConfig:
    values = {
        "campaign": name, "runs_dir": str(runs), "model": model, "compute": {"processes": processes},
        "sample": {
            "groups_per_round": arguments.shards * (arguments.batch // GROUP_SIZE), "group_size": GROUP_SIZE,
            "num_steps": arguments.steps, "guidance_scale": 5.0, "batch_size": arguments.batch,
            "latent_dtype": "float16",
        },
        "train": {"updates_per_round": UPDATES, "micro_batch": arguments.batch, "learning_rate": 1e-5, "beta": 0.1},
    }  # fmt: skip
    config = load_config(values, "benchmark")
    open_campaign(config)
    begin_round(config, 1)
    return config


def _sample(config: CampaignConfig, arguments: argparse.Namespace) -> float:
    """Images a second of a round's sampling, PNGs and trajectories written."""
    started = time.perf_counter()
    run_job(SAMPLE, config, 1, lambda count: None)
    seconds = time.perf_counter() - started
    table = pa.concat_tables([pq.ParquetFile(shard.rows_path).read() for shard in round_shards(config, 1)])
    write_table(config.folder, "samples", 1, table)
    return len(table) / seconds


def _train(config: CampaignConfig, arguments: argparse.Namespace) -> float:
    """Pair-steps a second of the updates of a round in which the first image of every group wins."""
    samples = read_rows(partition(config.folder, "samples", 1) / "part.parquet")
    groups = [list(members) for _, members in itertools.groupby(samples, key=lambda row: row["group_id"])]
    preferences = [
        {"pair_id": f"{winner['sample_id']}>{loser['sample_id']}", "group_id": winner["group_id"],
         "winner_id": winner["sample_id"], "loser_id": loser["sample_id"], "weight": 1.0, "num_raters": 1,
         "agreement": 1.0}
        for winner, loser in groups[: arguments.groups]
    ]  # fmt: skip
    write_table(config.folder, "preferences", 1, table_from_rows("preferences", preferences))
    run_job(TRAIN, config, 1, lambda count: None)
    updates = read_rows(partition(config.folder, "updates", 1) / "part.parquet")
    steps = len({row["step"] for row in read_rows(partition(config.folder, "update_steps", 1) / "part.parquet")})
    return sum(row["num_pairs"] for row in updates) * steps / sum(row["seconds"] for row in updates)


def report(results: Results) -> None:
    """Print rates and their ratios to one process, beside the goals."""
    print("median [min, max]; times one process (goal)")
    print(f"{'processes':>9}{'start, s':>10}{'sampling, images/s':>36}{'training, pair-steps/s':>36}")
    for processes, rates in results.items():
        cells = [f"{processes:>9}{rates['start, seconds']:>10.1f}"]
        for name in ("sampling", "training"):
            goal = GOALS.get(int(processes), {}).get(name)
            ratio = rates[name]["median"] / results["1"][name]["median"] if "1" in results else None
            times = (f" {ratio:.2f}x" if ratio else "") + (f" ({goal}x)" if goal else "")
            cells.append(f"{show(rates[name], 2) + times:>36}")
        print("".join(cells))


if __name__ == "__main__":
    main()
