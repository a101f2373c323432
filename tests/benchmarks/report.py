"""How long a report of 50 rounds takes: ``python tests/benchmarks/report.py``; 144 held-out images of 64 px a round.

The first report reads every held-out image; a report after each round reads only the new round's.
"""

import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from d3po_core.report.write import write_report

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.core.little_campaign import LittleCampaign

ROUNDS = 50
COPIED = ("samples", "judgements", "preferences", "updates", "evaluations", "rounds", "stages")


def main() -> None:
    """Print the seconds of a first report, of one written again, and the file's size."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "campaign"
        campaign = LittleCampaign(folder, [f"prompt {i}" for i in range(18)], seeds=8, size=64)
        for number in range(2):
            campaign.add_round(number, np.random.default_rng(number).random((18, 8)), pairs=32)
        for number in range(2, ROUNDS + 1):
            for table in COPIED:
                shutil.copytree(folder / table / "round=1", folder / table / f"round={number}")
        for what in ("first", "again", "again"):
            started = time.perf_counter()
            path = write_report(folder)
            seconds = time.perf_counter() - started
            print(f"{what}: {seconds:.1f} s, {path.stat().st_size / 1e6:.2f} MB")
        kept = folder / "report" / f"round={ROUNDS}.json"
        kept.unlink()
        started = time.perf_counter()
        write_report(folder)
        print(f"after a new round: {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    main()
