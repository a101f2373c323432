"""A collapse with and without the guard: the same campaign, with a learning rate that is far too high.

    python tests/benchmarks/collapse.py

Two campaigns of the deployment ``round`` that differ in ``guard.policy`` alone; they continue where they are. Writes
docs/collapse.csv and docs/collapse.png.
"""

import argparse
import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
from common import RESULTS, clean_environment

from d3po_core.paths import PROJECT_ROOT
from d3po_core.store.files import atomic_path
from d3po_core.store.stages import last_finished_round
from d3po_core.store.tables import connect

matplotlib.use("Agg")
from matplotlib import pyplot as plt

LEARNING_RATE = 1.2e-2
STYLES: dict[str, dict[str, Any]] = {
    "warn": {"label": "warned only", "color": "#D55E00", "linestyle": (0, (5, 2))},
    "reject": {"label": "guard rejects", "color": "#0072B2"},
}
COLUMNS = ("policy", "round", "started_from", "mean", "low", "high", "verdict")

Row = dict[str, Any]


def main() -> None:
    """Run what is missing, write the table, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=16, help="rounds a campaign in all (16)")
    parser.add_argument("--data", type=Path, default=RESULTS / "collapse", help="where the campaigns are kept")
    parser.add_argument("--out", type=Path, default=PROJECT_ROOT / "docs", help="where collapse.csv and .png go")
    arguments = parser.parse_args()
    rows = [row for policy in STYLES for row in campaign_rows(arguments, policy)]
    with atomic_path(arguments.out / "collapse.csv") as temporary, temporary.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, arguments.out / "collapse.png")
    for policy in STYLES:
        scores = [row["mean"] for row in rows if row["policy"] == policy]
        print(f"guard.policy {policy}: {scores[0]:.3f} at first, {min(scores):.3f} at worst, {scores[-1]:.3f} at last")


def campaign_rows(arguments: argparse.Namespace, policy: str) -> list[Row]:
    """Advance a campaign to the wanted round; a row a finished round."""
    folder = arguments.data / "runs" / f"collapse-{policy}"
    missing = arguments.rounds - max(last_finished_round(folder), 0)
    if missing > 0:
        command = [
            str(Path(sys.executable).parent / "d3po"), "run", "round", "--campaign", folder.name, "--rounds",
            str(missing), "--set", f"train.learning_rate={LEARNING_RATE}", "--set", f"guard.policy={policy}",
        ]  # fmt: skip
        subprocess.run(command, env=clean_environment(arguments.data), cwd=PROJECT_ROOT, check=True)
    with connect(folder) as connection:
        found = connection.execute(
            """
            SELECT round, coalesce(parse_filename(checkpoint_in), 'base') AS started_from,
                   round(eval_score_mean, 4), round(eval_score_low, 4), round(eval_score_high, 4), verdict
            FROM rounds ORDER BY round
            """
        ).fetchall()
    return [dict(zip(COLUMNS, (policy, *row), strict=True)) for row in found]


def draw(rows: list[Row], path: Path) -> None:
    """Held-out score against rounds; a rejected checkpoint is a hollow mark, and the line goes on from its start."""
    plt.rcParams.update({"font.size": 13, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(figsize=(8, 4.2), layout="constrained")
    for policy, style in STYLES.items():
        mine = [row for row in rows if row["policy"] == policy]
        rounds, means = [row["round"] for row in mine], [row["mean"] for row in mine]
        axes.plot(rounds, means, linewidth=2, marker="o", markersize=4, **style)
        axes.fill_between(rounds, [r["low"] for r in mine], [r["high"] for r in mine], color=style["color"], alpha=0.12)
        rejected = [row for row in mine if row["verdict"] == "rejected"]
        axes.plot([r["round"] for r in rejected], [r["mean"] for r in rejected], "o", markersize=11, fillstyle="none",
                  color=style["color"], linestyle="none", label="rejected" if rejected else None)  # fmt: skip
    axes.set(xlabel="round", ylabel="held-out images drawn right (share)", ylim=(0, 0.75))
    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.legend(frameon=False, loc="upper right", ncols=3)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=160, metadata={"Software": None})
    plt.close(figure)
    print(f"figure: {os.path.relpath(path)}")


if __name__ == "__main__":
    main()
