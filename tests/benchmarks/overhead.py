"""Share of a round's wall time that is not sampling, scoring or training.

    python tests/benchmarks/overhead.py

Real rounds of 512 images by ``d3po run round`` in a folder of their own. A round's wall time goes from the moment the
round before was finished to the moment this one was; the first round also carries the start of the process and is not
counted. Everything comes from the campaign's own files: the ``rounds`` table and the records of the stages.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import RESULTS, Spread, clean_environment, machine, show, spread, write_json
from rich.console import Console
from rich.table import Table

from d3po_core.paths import PROJECT_ROOT
from d3po_core.records import RoundRecord
from d3po_core.store.stages import finished_rounds, stage_path

CAMPAIGN = "overhead"
STAGES = ("sample", "judge", "derive", "train", "evaluate")
WORK = ("sample", "judge", "train")
LIMIT = 0.10
OUTSIDE, OUTSIDE_OR_EVALUATING = "outside, evaluation is work", "outside, evaluation is not work"


def main() -> None:
    """Run the rounds, print, write."""
    arguments = _arguments()
    before = machine()
    with tempfile.TemporaryDirectory(prefix="d3po-overhead-") as temporary:
        data = arguments.data or Path(temporary)
        environment = clean_environment(data)
        command = [
            str(Path(sys.executable).parent / "d3po"), "run", "round", "--campaign", CAMPAIGN,
            "--rounds", str(arguments.rounds), "--set", f"sample.groups_per_round={arguments.groups}",
            "--set", f"sample.group_size={arguments.group_size}",
            *(part for setting in arguments.set for part in ("--set", setting)),
        ]  # fmt: skip
        subprocess.run(command, env=environment, cwd=PROJECT_ROOT, check=True)
        campaign = data / "runs" / CAMPAIGN
        records = finished_rounds(campaign)
        rounds = [round_times(campaign, *pair) for pair in itertools.pairwise(records) if pair[1].round > 1]
    report(arguments, rounds, before)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="rounds to run, at least 2; all but the first count (2)")
    parser.add_argument("--groups", type=int, default=128, help="groups a round (128)")
    parser.add_argument("--group-size", type=int, default=4, help="images a group (4)")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="as for d3po run")
    parser.add_argument("--data", type=Path, help="keep the campaign in this folder")
    parser.add_argument("--output", type=Path, default=RESULTS / "overhead.json", help="JSON file")
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error("--rounds must be at least 2: the first round carries the start of the process")
    return arguments


def round_times(campaign: Path, before: RoundRecord, this: RoundRecord) -> dict[str, float]:
    """Seconds of a round's stages, of what lies between them, and of the whole; and the shares outside."""
    assert before.finished_at is not None
    assert this.finished_at is not None
    wall = (this.finished_at - before.finished_at).total_seconds()
    seconds = {stage: _stage_seconds(campaign, this.round, stage) for stage in STAGES}
    seconds["publish"] = this.stage_seconds["publish"]
    work = sum(seconds[stage] for stage in WORK)
    shares = {OUTSIDE: 1 - (work + seconds["evaluate"]) / wall, OUTSIDE_OR_EVALUATING: 1 - work / wall}
    return {**seconds, "between stages": wall - sum(seconds.values()), "round": wall, **shares}


def _stage_seconds(campaign: Path, round_number: int, stage: str) -> float:
    return float(json.loads(stage_path(campaign, round_number, stage).read_text())["seconds"])


def report(arguments: argparse.Namespace, rounds: list[dict[str, float]], before: dict[str, Any]) -> None:
    """Print the table and write the JSON file."""
    results: dict[str, Spread] = {name: spread(times[name] for times in rounds) for name in rounds[0]}
    images = arguments.groups * arguments.group_size
    title = rf"rounds of {images} images; median \[min, max] of {len(rounds)}"
    table = Table(title=title, title_justify="left")
    for column in ("part", "seconds", "share of the round"):
        table.add_column(column, justify="left" if column == "part" else "right", no_wrap=True)
    for name, measured in results.items():
        if name in (OUTSIDE, OUTSIDE_OR_EVALUATING):
            continue
        share = spread(times[name] / times["round"] for times in rounds)
        table.add_row(name, show(measured, 2), f"{share['median']:.1%}", end_section=name == "between stages")
    Console(width=110).print(table)
    for name in (OUTSIDE, OUTSIDE_OR_EVALUATING):
        shares = results[name]
        verdict = "within" if shares["max"] <= LIMIT else "above"
        print(f"{name}: {shares['median']:.1%} [{shares['min']:.1%}, {shares['max']:.1%}], {verdict} {LIMIT:.0%}")
    print("between stages: Prefect's task runs, MLflow's delivery, the process's own time")
    settings = {key: value for key, value in vars(arguments).items() if key != "data"} | {"images": images}
    write_json(arguments.output, settings, before, {"seconds": results, "load_after": os.getloadavg()[0]})


if __name__ == "__main__":
    main()
