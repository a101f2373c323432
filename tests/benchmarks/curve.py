"""Alignment against images: campaigns of 128 images a round, ours beside the ``published`` preset, several seeds.

    python tests/benchmarks/curve.py

Each campaign is run by ``d3po run`` in a folder of its own and continues where it was: stop this at any time and start
it again. After every campaign the curve so far is written: docs/curve.csv and docs/curve.png.
"""

import argparse
import csv
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from common import RESULTS, clean_environment
from PIL import Image

from d3po.flows.presets import deployment_config
from d3po_core.intervals import score_intervals
from d3po_core.paths import PROJECT_ROOT
from d3po_core.store.files import atomic_path
from d3po_core.store.stages import last_finished_round
from d3po_core.store.tables import connect

matplotlib.use("Agg")
from matplotlib import pyplot as plt

VARIANTS = ("round", "published")
# Okabe and Ito's colours stay apart for every kind of colour vision, and the lines also differ in their dashes.
STYLES: dict[str, dict[str, Any]] = {
    "round": {"label": "ours", "color": "#0072B2", "linestyle": "-"},
    "published": {"label": "published settings", "color": "#D55E00", "linestyle": (0, (5, 2))},
}
GOAL = 0.90
COLUMNS = ("images", "mean", "low", "high", "variant", "seed", "num_evaluated")

Row = dict[str, Any]


def main() -> None:
    """Run what is missing, write the table, draw."""
    arguments = _arguments()
    table, figure = arguments.out / "curve.csv", arguments.out / "curve.png"
    if arguments.plot_only:
        draw(read_table(table), figure)
        return
    campaigns = [(variant, seed) for seed in arguments.seeds for variant in arguments.variants]
    for variant, seed in campaigns:
        advance(arguments, variant, seed)
        rows = [row for campaign in campaigns for row in campaign_rows(arguments, *campaign)]
        write_rows(rows, table)
        draw(rows, figure)
    before_after(campaign_folder(arguments, "round", arguments.seeds[0]), arguments.out / "before_after.png")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="campaign seeds (0 1 2)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="deployments (both)")
    parser.add_argument("--rounds", type=int, default=32, help="rounds a campaign in all (32)")
    parser.add_argument("--images", type=int, default=128, help="images a round (128)")
    parser.add_argument("--images-per-prompt", type=int, default=8, help="evaluation images a held-out prompt (8)")
    parser.add_argument("--data", type=Path, default=RESULTS / "curve", help="where the campaigns are kept")
    parser.add_argument("--out", type=Path, default=PROJECT_ROOT / "docs", help="where curve.csv and curve.png go")
    parser.add_argument("--plot-only", action="store_true", help="only draw what curve.csv holds")
    return parser.parse_args()


def campaign_folder(arguments: argparse.Namespace, variant: str, seed: int) -> Path:
    """Where a campaign is."""
    return arguments.data / "runs" / f"curve-{variant}-{seed}"


def advance(arguments: argparse.Namespace, variant: str, seed: int) -> None:
    """Run the rounds that the campaign lacks."""
    folder = campaign_folder(arguments, variant, seed)
    missing = arguments.rounds - max(last_finished_round(folder), 0)
    if missing <= 0:
        return
    size = deployment_config(variant, None, []).sample.group_size
    settings = {
        "seed": seed,
        "sample.groups_per_round": max(1, arguments.images // size),
        "evaluate.images_per_prompt": arguments.images_per_prompt,
    }
    command = [
        str(Path(sys.executable).parent / "d3po"), "run", variant, "--campaign", folder.name, "--rounds", str(missing),
        *(part for field, value in settings.items() for part in ("--set", f"{field}={value}")),
    ]  # fmt: skip
    print(" ".join(["d3po", *command[1:]]), flush=True)
    subprocess.run(command, env=clean_environment(arguments.data), cwd=PROJECT_ROOT, check=True)


def campaign_rows(arguments: argparse.Namespace, variant: str, seed: int) -> list[Row]:
    """A row a finished round: images sampled until then and the held-out score, from the campaign's tables."""
    folder = campaign_folder(arguments, variant, seed)
    if last_finished_round(folder) < 0:
        return []
    with connect(folder) as connection:
        found = connection.execute(
            """
            SELECT r.images, list(e.score ORDER BY e.sample_id), list(e.prompt ORDER BY e.sample_id)
            FROM evaluations e JOIN (
                SELECT round, eval_scorer, sum(num_samples) OVER (ORDER BY round) AS images FROM rounds
            ) r ON e.round = r.round AND e.scorer = r.eval_scorer
            WHERE e.round <= $rounds GROUP BY ALL ORDER BY r.images
            """,
            {"rounds": arguments.rounds},
        ).fetchall()
    rows = []
    for images, scores, prompts in found:
        (score,) = score_intervals(np.array([scores]), prompts)
        numbers = {"mean": score.mean, "low": score.low, "high": score.high, "num_evaluated": len(scores)}
        rows.append({"images": int(images), **numbers, "variant": variant, "seed": seed})
    return rows


def before_after(campaign: Path, path: Path) -> None:
    """Put the held-out grids of the base and of the last checkpoint side by side: the same prompts and seeds."""
    last = last_finished_round(campaign)
    if last < 1:
        return
    grids = [Image.open(campaign / "images" / f"round={n}" / "grid.png") for n in (0, last)]
    gap = 32
    canvas = Image.new("RGB", (2 * grids[0].width + gap, grids[0].height), "white")
    for index, grid in enumerate(grids):
        canvas.paste(grid, (index * (grid.width + gap), 0))
    with atomic_path(path) as temporary:
        canvas.save(temporary, format="PNG", optimize=True)
    print(f"picture: {os.path.relpath(path)}", flush=True)


def write_rows(rows: list[Row], path: Path) -> None:
    """Write the curve's table."""
    with atomic_path(path) as temporary, temporary.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items()})
    print(f"table: {os.path.relpath(path)}", flush=True)


def read_table(path: Path) -> list[Row]:
    """The curve's table."""
    with path.open(newline="") as stream:
        kinds = {"variant": str, "images": int, "seed": int, "num_evaluated": int}
        return [{k: kinds.get(k, float)(v) for k, v in row.items()} for row in csv.DictReader(stream)]


def draw(rows: list[Row], path: Path) -> None:
    """Draw every seed thin and their mean thick, over the images for which all seeds of the variant have a score."""
    plt.rcParams.update({"font.size": 13, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(figsize=(8, 4.8), layout="constrained")
    for variant in (v for v in VARIANTS if any(row["variant"] == v for row in rows)):
        style = STYLES[variant]
        means = defaultdict(list)
        seeds = sorted({row["seed"] for row in rows if row["variant"] == variant})
        for seed in seeds:
            line = sorted((r["images"], r["mean"]) for r in rows if r["variant"] == variant and r["seed"] == seed)
            axes.plot(*zip(*line, strict=True), color=style["color"], linewidth=0.8, alpha=0.45)
            for images, mean in line:
                means[images].append(mean)
        whole = sorted((images, statistics.mean(v)) for images, v in means.items() if len(v) == len(seeds))
        label = f"{style['label']} (mean of {len(seeds)} seeds)" if len(seeds) > 1 else style["label"]
        axes.plot(*zip(*whole, strict=True), linewidth=2.8, **style | {"label": label})
    axes.axhline(GOAL, color="0.5", linewidth=0.9, linestyle=":", zorder=0)
    axes.annotate(f"{GOAL:.2f}", (1, GOAL), xycoords=("axes fraction", "data"), xytext=(-2, 3),
                  textcoords="offset points", ha="right", color="0.4", fontsize=11)  # fmt: skip
    axes.set(xlabel="images sampled and judged so far", ylabel="held-out images drawn right (share)", ylim=(0, 1))
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(loc="lower right", frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=160, metadata={"Software": None})
    plt.close(figure)
    print(f"figure: {os.path.relpath(path)}", flush=True)


if __name__ == "__main__":
    main()
