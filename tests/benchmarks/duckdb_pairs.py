"""Seconds and memory to derive preferences from a million judgements.

    python tests/benchmarks/duckdb_pairs.py

Groups of 4 images, one judgement an image, as one round of a campaign. Each measurement is a fresh process that opens
the tables, derives the preferences and writes them; its peak memory is its own (resource.getrusage).
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from common import RESULTS, machine, show, spread, write_json
from rich.console import Console
from rich.table import Table

from d3po_core.preferences.deriving import derive_preferences
from d3po_core.store.tables import SCHEMAS, connect, write_table

ROUND = 1
GROUP_SIZE = 4
SCORES = ("real", "binary")
RULES = (("pareto", "all"), ("pareto", "best_worst"))


def main() -> None:
    """Make the tables, measure in turns, print, write. Called by itself with ``--step`` for each process."""
    arguments = _arguments()
    if arguments.step:
        steps = {"make": _make, "measure": _measure}
        print(json.dumps(steps[arguments.step](arguments)))
        return
    before = machine()
    measured: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(prefix="d3po-pairs-") as folder, Console(stderr=True).status("") as status:
        for scores in SCORES:
            status.update(f"making {arguments.judgements:,} judgements, {scores} scores")
            _call("make", Path(folder) / scores, arguments.judgements, scores=scores)
        for repeat in range(arguments.repeats):
            for scores in SCORES:
                for combine, pairs in RULES:
                    name = f"{combine}/{pairs}, {scores} scores"
                    status.update(f"turn {repeat + 1}: {name}")
                    found = _call("measure", Path(folder) / scores, arguments.judgements, combine=combine, pairs=pairs)
                    measured.setdefault(name, []).append(found)
    report(arguments, measured, before)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--judgements", type=int, default=1_000_000, help="rounded down to whole groups (1,000,000)")
    parser.add_argument("--repeats", type=int, default=3, help="turns of every measurement (3)")
    parser.add_argument("--output", type=Path, default=RESULTS / "duckdb_pairs.json", help="JSON file")
    for name in ("step", "folder", "scores", "combine", "pairs"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    return parser.parse_args()


def _call(step: str, folder: Path, judgements: int, **options: str) -> dict[str, Any]:
    """Do a step in a process of its own, so that nobody else's memory is in its peak."""
    command = [sys.executable, __file__, "--step", step, "--folder", str(folder), "--judgements", str(judgements)]
    command += [part for name, value in options.items() for part in (f"--{name}", value)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def _make(arguments: argparse.Namespace) -> dict[str, Any]:
    folder, groups = Path(arguments.folder), arguments.judgements // GROUP_SIZE
    count = groups * GROUP_SIZE
    group, member = np.divmod(np.arange(count), GROUP_SIZE)
    group_id = [f"r{ROUND}-g{g}" for g in range(groups)]
    groups_of = pa.array(group_id).take(pa.array(group))
    sample_id = pa.array([f"{name}-m{m}" for name in group_id for m in range(GROUP_SIZE)])
    generator = np.random.default_rng(0)
    values = generator.random(count)
    if arguments.scores == "binary":
        values = (values < 0.5).astype(float)
    order = pa.array(generator.permutation(count))  # raters do not answer in the order of the images

    def same(text: str) -> pa.Array:
        return pa.repeat(text, count)

    samples = {
        "sample_id": sample_id, "group_id": groups_of, "member": member, "prompt": same("a red circle"),
        "split": same("train"), "seed": generator.integers(0, 2**62, count), "image_path": sample_id,
        "trajectory_path": same("shard"), "trajectory_row": member, "checkpoint": pa.nulls(count, pa.string()),
    }  # fmt: skip
    now = pa.scalar(datetime.now(UTC).replace(tzinfo=None), pa.timestamp("us"))
    judgements = {
        "rater": same("rater"), "rater_kind": same("proxy"), "kind": same("score"), "sample_id": sample_id,
        "other_id": pa.nulls(count, pa.string()), "value": values, "judged_at": pa.repeat(now, count),
        "source": same("proxy"), "seconds": pa.nulls(count, pa.float64()), "position": pa.nulls(count, pa.int64()),
        "both_bad": pa.nulls(count, pa.bool_()),
    }  # fmt: skip
    write_table(folder, "samples", ROUND, pa.table(samples, schema=SCHEMAS["samples"]))
    write_table(folder, "judgements", ROUND, pa.table(judgements, schema=SCHEMAS["judgements"]).take(order))
    return {"judgements": count}


def _measure(arguments: argparse.Namespace) -> dict[str, Any]:
    folder, imported_mb = Path(arguments.folder), _peak_mb()
    started = time.perf_counter()
    with connect(folder) as connection:
        derived = derive_preferences(connection, ROUND, arguments.combine, arguments.pairs)
    derived_at = time.perf_counter()
    derived_mb = _peak_mb()
    path = write_table(folder, "preferences", ROUND, derived.table)
    written_at = time.perf_counter()
    path.unlink()
    return {
        "derive_seconds": derived_at - started, "write_seconds": written_at - derived_at, "imported_mb": imported_mb,
        "derived_mb": derived_mb, "peak_mb": _peak_mb(), "pairs": len(derived.table), "ties": derived.num_ties,
    }  # fmt: skip


def _peak_mb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)


def report(arguments: argparse.Namespace, measured: dict[str, list[dict[str, Any]]], before: dict[str, Any]) -> None:
    """Print the table and write the JSON file."""
    count = arguments.judgements // GROUP_SIZE * GROUP_SIZE
    title = rf"{count:,} judgements, groups of {GROUP_SIZE}; median \[min, max] of {arguments.repeats}"
    table = Table(title=title, title_justify="left")
    for column in ("rule", "pairs", "ties", "derive s", "write s", "peak MB"):
        table.add_column(column, justify="left" if column == "rule" else "right", no_wrap=True)
    results: dict[str, Any] = {}
    for name, turns in measured.items():
        counts = {(turn["pairs"], turn["ties"]) for turn in turns}
        assert len(counts) == 1, f"{name}: the turns found different pairs: {counts}"
        pairs, ties = counts.pop()
        figures = {key: spread(turn[key] for turn in turns) for key in turns[0] if key not in ("pairs", "ties")}
        results[name] = {"pairs": pairs, "ties": ties, **figures}
        table.add_row(
            name, f"{pairs:,}", f"{ties:,}", show(figures["derive_seconds"], 2), show(figures["write_seconds"], 2),
            show(figures["peak_mb"], 0),
        )  # fmt: skip
    Console(width=130).print(table)
    imported = next(iter(results.values()))["imported_mb"]["median"]
    print(f"derive: connect and derive_preferences. Of the peak, {imported:.0f} MB are the imports.")
    write_json(arguments.output, {"judgements": count, "repeats": arguments.repeats}, before, {"rules": results})


if __name__ == "__main__":
    main()
