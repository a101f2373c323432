"""What grows with the number of rounds: ``python tests/benchmarks/thousand_rounds.py``.

Runs a campaign for a few rounds, copies the last of them up to three before the end, and runs it on. A round's seconds
outside are its wall time, from the end of the round before to its own, less sampling, judging, training and evaluation.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
from common import RESULTS, Spread, clean_environment, machine, show, spread, write_json
from long_campaign import lengthen
from overhead import round_times

from d3po_core.paths import PROJECT_ROOT
from d3po_core.store.stages import finished_round
from d3po_core.store.tables import write_table

CAMPAIGN, MANY = "long", "many"
EARLY, BEYOND = 10, 1  # the early round that counts; rounds after a counted one, so that it is not the run's last
WORK = ("sample", "judge", "train", "evaluate")
COMMANDS: dict[str, tuple[list[str], float | None]] = {
    "rounds": (["rounds"], 2.0),
    "report": (["report"], 10.0),
    "compare": (["compare", "base", "latest"], None),
    "show": (["show", "r5-g0-m0"], None),
    "check": (["check"], None),
}
GROUP_BY = "SELECT rater, count(*), avg(value) FROM judgements GROUP BY rater"


def main() -> None:
    """Make the campaign, measure, print, write."""
    arguments, before = _arguments(), machine()
    with tempfile.TemporaryDirectory(prefix="d3po-thousand-") as temporary:
        data = arguments.data or Path(temporary)
        _run(data, EARLY + BEYOND + 1 - _finished(data))
        source = _finished(data)
        if source < arguments.rounds - 2:
            lengthen(data, CAMPAIGN, source, arguments.rounds - 2)
        _run(data, arguments.rounds + BEYOND - _finished(data))
        folder = data / "runs" / CAMPAIGN
        outside = {number: _outside(folder, number) for number in (EARLY, arguments.rounds)}
        ratio = outside[arguments.rounds] / outside[EARLY]
        shown = ", ".join(f"round {number} {seconds:.2f} s" for number, seconds in outside.items())
        print(f"outside: {shown}; {ratio:.2f} times (goal 1.2)")
        seconds = {name: _repeat(data, [*typed, "--campaign", CAMPAIGN], arguments.repeats, goal, name)
                   for name, (typed, goal) in COMMANDS.items()}  # fmt: skip
        size = (folder / "report.html").stat().st_size
        print(f"report: {size / 1e6:.1f} MB (goal 10)")
        _many_judgements(data / "runs" / MANY, folder, arguments.rounds, arguments.judgements)
        query = ["query", "--campaign", MANY, GROUP_BY]
        seconds["query"] = _repeat(data, query, arguments.repeats, 2.0, "GROUP BY")
    results = {"outside": outside, "ratio": ratio, "seconds": seconds, "report_bytes": size}
    write_json(RESULTS / "thousand_rounds.json", vars(arguments), before, results)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=1000, help="the late round that counts (1000)")
    parser.add_argument("--repeats", type=int, default=3, help="of each command (3)")
    parser.add_argument("--judgements", type=int, default=10_000_000, help="rows of the GROUP BY (10000000)")
    parser.add_argument("--data", type=Path, help="keep the campaigns in this folder, and go on with those in it")
    return parser.parse_args()


def _finished(data: Path) -> int:
    return max((int(p.name.removeprefix("round=")) for p in data.glob(f"runs/{CAMPAIGN}/rounds/round=*")), default=0)


def _d3po(data: Path, typed: list[str]) -> None:
    command = [str(Path(sys.executable).parent / "d3po"), *typed]
    subprocess.run(command, env=clean_environment(data), cwd=PROJECT_ROOT, check=True, stdout=subprocess.DEVNULL)


def _run(data: Path, rounds: int) -> None:
    if rounds > 0:
        small = ["sample.groups_per_round=16", "sample.group_size=2"]
        settings = [part for setting in small for part in ("--set", setting)]
        _d3po(data, ["run", "round", "--campaign", CAMPAIGN, "--rounds", str(rounds), *settings])


def _outside(folder: Path, number: int) -> float:
    times = round_times(folder, finished_round(folder, number - 1), finished_round(folder, number))
    return times["round"] - sum(times[stage] for stage in WORK)


def _repeat(data: Path, typed: list[str], repeats: int, goal: float | None, name: str) -> Spread:
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        _d3po(data, typed)
        taken.append(time.perf_counter() - started)
    print(f"{name}: {show(spread(taken), 2)} s{f' (goal {goal:g})' if goal else ''}", flush=True)
    return spread(taken)


def _many_judgements(folder: Path, like: Path, rounds: int, total: int) -> None:
    """Write judgements only, one file per round, into a campaign folder with another's identity."""
    if folder.exists():
        return
    folder.mkdir(parents=True)
    (folder / "campaign.json").write_bytes((like / "campaign.json").read_bytes())
    rows, generator = total // rounds, np.random.default_rng(0)
    empty = {"other_id": pa.string(), "seconds": pa.float64(), "position": pa.int64(), "both_bad": pa.bool_()}
    for number in range(1, rounds + 1):
        columns = {
            "rater": pa.array([f"scorer {i % 4}" for i in range(rows)]), "rater_kind": pa.array(["proxy"] * rows),
            "kind": pa.array(["score"] * rows),
            "sample_id": pa.array([f"r{number}-g{i // 16}-m{i // 4 % 4}" for i in range(rows)]),
            "value": pa.array(generator.random(rows)), "source": pa.array(["proxy"] * rows),
            "judged_at": pa.array([datetime(2026, 1, 1)] * rows, pa.timestamp("us")),
            **{name: pa.nulls(rows, kind) for name, kind in empty.items()},
        }  # fmt: skip
        order = ("rater", "rater_kind", "kind", "sample_id", "other_id", "value", "judged_at", "source", "seconds",
                 "position", "both_bad")  # fmt: skip
        write_table(folder, "judgements", number, pa.table({name: columns[name] for name in order}), name="proxy")


if __name__ == "__main__":
    main()
