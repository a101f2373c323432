"""Whole rounds on one GPU, through Prefect, DuckDB and MLflow: seconds by stage, the GPU's busy share, rates.

    python tests/benchmarks/gpu_round.py                                    deployment sd15-smoke: 256 images a round
    python tests/benchmarks/gpu_round.py --groups 500 --group-size 2        1,000 images and 500 pairs a round
    python tests/benchmarks/gpu_round.py --warm-start                       and the start of a second process
    python tests/benchmarks/gpu_round.py --embedded                         32 rounds of the embedded model
    python tests/benchmarks/gpu_round.py --device cpu --smoke               only that it works, embedded model

``d3po run sd15-smoke`` as anybody types it, with Stable Diffusion 1.5's architecture and random weights unless
``--model`` is a folder that has some. All rounds are one process's; the first pays for the compilation. With ``--data``
the campaign stays and goes on; ``--rounds 0`` then only reports. All times are from the campaign's own files: a stage's
record says when it was finished and how long it took.
"""

import argparse
import csv
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, clean_environment, machine, write_json
from gpu_usage import watching
from random_models import random_pipeline
from rich.console import Console
from rich.table import Table
from stage_times import STAGES, USAGE_FILE, all_round_times, note_start, start_times

from d3po_core.paths import PROJECT_ROOT
from d3po_core.store.files import atomic_path
from d3po_core.store.stages import finished_rounds, last_finished_round

TINY = {
    "sample.groups_per_round": 4, "sample.batch_size": 8, "sample.num_steps": 4, "evaluate.images_per_prompt": 1,
    "evaluate.max_prompts": 4, "train.updates_per_round": 2, "train.micro_batch": 16,
}  # fmt: skip
EMBEDDED_MODEL = "data/shapes/model"
CURVE_COLUMNS = ("round", "images", "mean", "low", "high", "seconds")

Settings = dict[str, Any]
Results = dict[str, Any]


def main() -> None:
    """Run the rounds, print, write."""
    arguments = _arguments()
    before = machine() | {"gpu": torch.cuda.get_device_name() if arguments.device == "cuda" else None}
    with tempfile.TemporaryDirectory(prefix="d3po-gpu-round-") as temporary:
        data = arguments.data or Path(temporary)
        data.mkdir(parents=True, exist_ok=True)
        results = embedded(arguments, data) if arguments.embedded else preset(arguments, data, Path(temporary))
    write_json(arguments.output, vars(arguments), before, results)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="rounds to add (2; with --embedded 32)")
    parser.add_argument("--groups", type=int, help="groups a round (the deployment's)")
    parser.add_argument("--group-size", type=int, help="images a group (the deployment's)")
    parser.add_argument(
        "--model", type=Path, help="folder of a pipeline; random weights are written there if it is new"
    )
    parser.add_argument("--warm-start", action="store_true", help="afterwards one round more by a second process")
    parser.add_argument("--embedded", action="store_true", help="the deployment 'round' instead, and its curve")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="where (cuda); cpu: embedded model")
    parser.add_argument("--smoke", action="store_true", help="few images and steps: only that it works")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="as for d3po run")
    parser.add_argument("--data", type=Path, help="keep the campaigns in this folder, and go on with them")
    parser.add_argument("--output", type=Path, help="JSON file (benchmark-results/gpu_round*.json)")
    arguments = parser.parse_args()
    if arguments.rounds is None:
        arguments.rounds = (2 if arguments.smoke else 32) if arguments.embedded else 2
    name = "gpu_round_embedded" if arguments.embedded else "gpu_round"
    arguments.output = arguments.output or RESULTS / f"{name}.json"
    return arguments


def preset(arguments: argparse.Namespace, data: Path, temporary: Path) -> Results:
    """Rounds of the deployment ``sd15-smoke``, and the start of a second process if asked for."""
    settings: Settings = {"model.device": arguments.device} | _model_settings(arguments, temporary)
    settings |= TINY if arguments.smoke else {}
    sizes = {"sample.groups_per_round": arguments.groups, "sample.group_size": arguments.group_size}
    settings |= {field: size for field, size in sizes.items() if size}
    environment = clean_environment(data)
    # One cache for all processes; a folder of the user's is taken as it is, and then nothing may be left to compile.
    cache = Path(environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(temporary / "inductor")))
    results: Results = {"compiled_before": cache.exists() and any(cache.iterdir()), "starts": {}}
    campaign = data / "runs" / "gpu-round"
    if arguments.rounds:
        run(arguments, data, environment, "sd15-smoke", campaign.name, arguments.rounds, settings)
    results["rounds"] = all_round_times(data, campaign)
    report_rounds(results["rounds"])
    if last_finished_round(campaign) >= 1:
        results["starts"]["first process"] = start_times(data, campaign)
    if arguments.warm_start:
        second = data / "runs" / "gpu-round-warm"
        if last_finished_round(second) < 1:
            run(arguments, data, environment, "sd15-smoke", second.name, 1, settings)
        results["starts"]["second process"] = start_times(data, second)
    if results["starts"]:
        report_starts(results["starts"], results["compiled_before"])
    return results


def _model_settings(arguments: argparse.Namespace, temporary: Path) -> Settings:
    if arguments.device == "cpu":
        return {"model.path": EMBEDDED_MODEL, "model.precision": "'no'", "model.compile": False}
    folder = (arguments.model or temporary / "model").resolve()
    # The index is written last.
    if not (folder / "model_index.json").exists() and arguments.rounds + arguments.warm_start:
        started = time.perf_counter()
        random_pipeline("sd15", torch.float16, "cpu").save_pretrained(folder)
        print(f"random weights written in {time.perf_counter() - started:.0f} s", flush=True)
    return {"model.path": str(folder)}


def run(
    arguments: argparse.Namespace, data: Path, environment: dict[str, str], deployment: str, campaign: str,
    rounds: int, settings: Settings,
) -> None:  # fmt: skip
    """``d3po run`` in a process of its own, while the GPU is watched."""
    places = os.pathsep.join((str(Path(sys.executable).parent), environment.get("PATH", "")))
    changes = [f"{field}={value}" for field, value in settings.items()] + arguments.set
    command = [
        shutil.which("d3po", path=places) or "d3po", "run", deployment, "--campaign", campaign,
        "--rounds", str(rounds), *(part for change in changes for part in ("--set", change)),
    ]  # fmt: skip
    print(" ".join(["d3po", *command[1:]]), flush=True)
    note_start(data, campaign)
    with watching(data / USAGE_FILE):
        subprocess.run(command, env=environment, cwd=PROJECT_ROOT, check=True)


def report_rounds(rounds: list[Results]) -> None:
    """A column a round: seconds by stage with the GPU's busy share, then rates."""
    table = Table(title="seconds (share of the time in which a kernel ran)", title_justify="left")
    table.add_column("", no_wrap=True)
    for times in rounds:
        name = f"round {times['round']}" if times["round"] else "base"
        table.add_column(name + (" *" if times["first_of_its_process"] else ""), justify="right", no_wrap=True)
    for stage in STAGES:
        table.add_row(stage, *(_cell(times["seconds"].get(stage), times["gpu"].get(stage)) for times in rounds))
    table.add_row("between stages", *(_cell(times["between_stages_seconds"], None) for times in rounds))
    table.add_row("round", *(_cell(times["wall_seconds"], times["gpu"]["round"]) for times in rounds), end_section=True)
    for name in ("sample images/s", "evaluate images/s", "train pair-steps/s", "updates pair-steps/s",
                 "last update pair-steps/s"):  # fmt: skip
        table.add_row(name, *(f"{times[name]:,.2f}" if name in times else "" for times in rounds))
    for name in ("images", "pairs", "pair_steps", "ties"):
        table.add_row(name.replace("_", "-"), *(f"{times.get(name, 0):,}" for times in rounds))
    memory = [(times["gpu"]["round"] or {}).get("memory_gb") for times in rounds]
    table.add_row("most memory on the card, GB", *(f"{value:.1f}" if value else "" for value in memory))
    Console(width=120).print(table)
    print("* the first of its process: begins with the start of d3po; base: round 0, which only evaluates")


def _cell(seconds: float | None, gpu: dict[str, float] | None) -> str:
    if seconds is None:
        return ""
    return f"{seconds:,.1f}" + (f" ({gpu['busy']:.0%})" if gpu else "")


def report_starts(starts: dict[str, dict[str, float]], compiled_before: bool) -> None:
    """What each process's start took, side by side."""
    table = Table(title="seconds from a process's start", title_justify="left")
    for column in ("until", *starts):
        table.add_column(column, justify="left" if column == "until" else "right", no_wrap=True)
    for name in next(iter(starts.values())):
        table.add_row(name, *(f"{times[name]:.1f}" for times in starts.values()))
    Console(width=120).print(table)
    cache = "had been used before" if compiled_before else "was empty"
    print(f"the cache of compiled code {cache} when this benchmark began")


def embedded(arguments: argparse.Namespace, data: Path) -> Results:
    """Rounds of the deployment ``round``: held-out score against images, and the time of them all."""
    settings: Settings = {"model.device": arguments.device}
    settings |= {"sample.groups_per_round": 8, "evaluate.images_per_prompt": 1} if arguments.smoke else {}
    campaign = data / "runs" / "gpu-embedded"
    started = time.perf_counter()
    if arguments.rounds:
        run(arguments, data, clean_environment(data), "round", campaign.name, arguments.rounds, settings)
    wall = time.perf_counter() - started
    rounds = all_round_times(data, campaign)
    rows = curve(rounds)
    path = arguments.output.with_suffix(".csv")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary, temporary.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, CURVE_COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    table = Table(
        title=f"held-out {finished_rounds(campaign)[0].eval_scorer}, with its 95 % interval", title_justify="left"
    )
    for column in ("round", "images", "mean", "interval", "seconds"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        interval = f"{row['low']:.3f} to {row['high']:.3f}"
        table.add_row(str(row["round"]), f"{row['images']:,}", f"{row['mean']:.3f}", interval, f"{row['seconds']:.1f}")
    Console(width=120).print(table)
    stages = {stage: sum(times["seconds"].get(stage, 0.0) for times in rounds) for stage in STAGES}
    print(f"{wall:.0f} s for {arguments.rounds} rounds, start and end of the process included; all finished rounds: "
          + ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in stages.items()))  # fmt: skip
    print(f"table: {os.path.relpath(path)}")
    return {"wall_seconds": wall, "stage_seconds": stages, "curve": rows, "rounds": rounds}


def curve(rounds: list[Results]) -> list[Results]:
    """A row a finished round: images sampled until then, the held-out score, and the round's seconds."""
    rows, images = [], 0
    for times in rounds:
        images += times.get("images", 0)
        rows.append({"round": times["round"], "images": images, **times["held_out"], "seconds": times["wall_seconds"]})
    return rows


if __name__ == "__main__":
    main()
