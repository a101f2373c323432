"""Time and memory of importing a million judgements, each measurement in a process of its own.

python tests/benchmarks/import_judgements.py [--judgements 1000000] [--repeats 3]
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.benchmarks.common import RESULTS, machine, show, spread, write_json

GROUP_SIZE, ROUND = 4, 1
FILES = ("choice.csv", "rating.csv", "rank.csv", "rating, all wrong.csv", "rating.json", "positional.json")


def main() -> None:
    """Make the files, import each in turn, print a table and write JSON. Called by itself with ``--step``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--judgements", type=int, default=1_000_000, help="rounded down to whole groups (1,000,000)")
    parser.add_argument("--repeats", type=int, default=3, help="turns of every measurement (3)")
    parser.add_argument("--files", nargs="+", default=FILES, choices=FILES, help="which files (all)")
    parser.add_argument("--output", type=Path, default=RESULTS / "import_judgements.json", help="JSON file")
    parser.add_argument("--step", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        found = _make(arguments) if arguments.step == "make" else _measure(arguments.folder, arguments.step)
        print(json.dumps(found))
        return
    before = machine()
    measured: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(prefix="d3po-import-") as folder, Console(stderr=True).status("making the files"):
        _call("make", folder, arguments.judgements)
        for _ in range(arguments.repeats):
            for name in arguments.files:
                measured.setdefault(name, []).append(_call(name, folder, arguments.judgements))
    table = Table(title=rf"{arguments.judgements:,} judgements; median \[min, max] of {arguments.repeats}")
    for column in ("file", "MB", "rows written", "seconds", "CPU seconds", "peak MB"):
        table.add_column(column, justify="left" if column == "file" else "right", no_wrap=True)
    results: dict[str, Any] = {}
    for name, turns in measured.items():
        figures = {key: spread(turn[key] for turn in turns) for key in ("seconds", "cpu_seconds", "peak_mb")}
        results[name] = {"megabytes": turns[0]["megabytes"], "rows": turns[0]["rows"], **figures}
        table.add_row(
            name, f"{turns[0]['megabytes']:.0f}", f"{turns[0]['rows']:,}", show(figures["seconds"], 2),
            show(figures["cpu_seconds"], 2), show(figures["peak_mb"], 0),
        )  # fmt: skip
    Console(width=130).print(table)
    settings = {"judgements": arguments.judgements, "repeats": arguments.repeats}
    write_json(arguments.output, settings, before, {"files": results})


def _call(step: str, folder: str, judgements: int) -> dict[str, Any]:
    """Do a step in a process of its own, so that nobody else's memory is in its peak."""
    command = [sys.executable, __file__, "--step", step, "--folder", folder, "--judgements", str(judgements)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def _make(arguments: argparse.Namespace) -> dict[str, Any]:
    from d3po_core.config import CampaignConfig
    from d3po_core.store.tables import SCHEMAS, write_table

    folder, groups = arguments.folder, arguments.judgements // GROUP_SIZE
    count = groups * GROUP_SIZE
    group, member = np.divmod(np.arange(count), GROUP_SIZE)
    group_id = pa.array([f"r{ROUND}-g{g}" for g in range(groups)]).take(pa.array(group))
    sample_id = pa.array([f"r{ROUND}-g{g}-m{m}" for g, m in zip(group.tolist(), member.tolist(), strict=True)])
    other = sample_id.take(pa.array(group * GROUP_SIZE + (member + 1) % GROUP_SIZE))

    def same(text: str | None) -> pa.Array:
        return pa.array([text], pa.string()).take(pa.array(np.zeros(count, dtype=np.int64)))

    samples = {
        "sample_id": sample_id, "group_id": group_id, "member": member, "prompt": same("a red circle"),
        "split": same("train"), "seed": member, "image_path": sample_id, "trajectory_path": same("shard"),
        "trajectory_row": member, "checkpoint": same(None),
    }  # fmt: skip
    config = CampaignConfig(campaign="bench", runs_dir=str(folder))
    write_table(config.folder, "samples", ROUND, pa.table(samples, schema=SCHEMAS["samples"]))
    generator = np.random.default_rng(0)
    moments = np.datetime64("2024-05-01T08:00:00") + np.arange(count).astype("timedelta64[s]")
    common = {
        "rater": pa.array([f"rater {n}" for n in range(20)]).take(pa.array(generator.integers(0, 20, count))),
        "judged_at": pa.array(np.char.add(moments.astype(str), "Z")), "seconds": generator.random(count).round(2) * 9,
        "position": member, "prompt": same("a red circle"),
    }  # fmt: skip
    choices = pa.array(["first", "second", "tie", "skip"]).take(pa.array(generator.integers(0, 4, count)))
    tables = {
        "choice.csv": {"first_id": sample_id, "second_id": other, "choice": choices},
        "rating.csv": {"sample_id": sample_id, "rating": generator.integers(0, 2, count)},
        "rank.csv": {"group_id": group_id, "sample_id": sample_id, "rank": member + 1},
        "rating, all wrong.csv": {"sample_id": sample_id, "rating": same("wonderful")},
    }
    for name, columns in tables.items():
        pyarrow.csv.write_csv(pa.table(columns | common), folder / name)
    records = [{"sample_id": s, "rating": 1, "rater": "anna"} for s in sample_id.to_pylist()]
    (folder / "rating.json").write_text(json.dumps(records))
    (folder / "positional.json").write_text(json.dumps(generator.integers(0, 2, (groups, GROUP_SIZE)).tolist()))
    return {"judgements": count}


def _measure(folder: Path, name: str) -> dict[str, Any]:
    from d3po_core.config import CampaignConfig
    from d3po_core.judgement_files.importing import import_file

    config = CampaignConfig(campaign="bench", runs_dir=str(folder))
    started, used = time.perf_counter(), time.process_time()
    options: dict[str, Any] = {"order": "sampled", "rater": "anna"} if name == "positional.json" else {}
    report = import_file(config.folder, folder / name, **options)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - used
    if report.written:
        report.written.unlink()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "seconds": seconds, "cpu_seconds": cpu_seconds, "peak_mb": peak / (1e6 if sys.platform == "darwin" else 1e3),
        "megabytes": (folder / name).stat().st_size / 1e6, "rows": report.num_good,
    }  # fmt: skip


if __name__ == "__main__":
    main()
