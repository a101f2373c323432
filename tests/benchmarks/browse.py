"""How fast ``d3po browse`` answers over a campaign of 100,000 images: ``python tests/benchmarks/browse.py``.

Writes the tables of sampled, scored, paired and partly judged images, all with one small file, serves them in a process
of its own, and asks over HTTP: the first page, pages with filters, the last page, a thumbnail, a story.
"""

import argparse
import http.client
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from common import RESULTS, machine, show, spread, write_json

from d3po_core.paths import PROJECT_ROOT
from d3po_core.store.images import save_png
from d3po_core.store.tables import table_from_rows, write_table

PORT = 8791
SERVER = """
import sys
from d3po_core.browser.app import create_app
from d3po_core.page.serving import serve
serve(create_app("key"), "127.0.0.1", int(sys.argv[1]))
"""
REQUESTS = {
    "first page": "/c/{name}",
    "prompt and best": "/c/{name}?prompt=prompt+7&order=best",
    "won, judged, one round": "/c/{name}?round=3&won=yes&judged=yes",
    "score range, worst": "/c/{name}?low=0.4&high=0.6&order=worst",
    "last page": "/c/{name}?page=1667",
    "thumbnail": "/c/{name}/small/r3-g5-m1",
    "story": "/c/{name}/story/r3-g5-m1",
}


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    before = machine()
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        name = _write(Path(folder) / "runs", arguments.images, arguments.rounds)
        server = subprocess.Popen([sys.executable, "-c", SERVER, str(PORT)], cwd=PROJECT_ROOT,
                                  env=os.environ | {"D3PO_DATA": folder})  # fmt: skip
        try:
            results = {"opened_seconds": _first(name)}
            print(f"opened: {results['opened_seconds']:.1f} s")
            for what, path in REQUESTS.items():
                measured = spread(_ask(path.format(name=name)) * 1000 for _ in range(arguments.repeats))
                results[what] = measured
                print(f"{what:24} {show(measured)} ms", flush=True)
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait()
    write_json(RESULTS / "browse.json", vars(arguments), before, results)


def _write(runs: Path, images: int, rounds: int) -> str:
    """Write the campaign ``big`` and return its name."""
    sys.path.insert(0, str(PROJECT_ROOT))
    from tests.core.little_campaign import NOON, LittleCampaign

    campaign = LittleCampaign(runs / "big", [f"prompt {i}" for i in range(8)], seeds=2)
    random = np.random.default_rng(0)
    groups = images // rounds // 4
    campaign.add_round(0, random.random((8, 2)))
    image = "images/one.png"
    save_png(random.integers(0, 256, (64, 64, 3), dtype=np.uint8), campaign.folder / image)
    for number in range(1, rounds + 1):
        campaign.add_round(number, random.random((8, 2)))
        for table in ("samples", "judgements", "preferences"):
            for path in (campaign.folder / table / f"round={number}").iterdir():
                path.unlink()
        ids = [(g, m, f"r{number}-g{g}-m{m}") for g, m in itertools.product(range(groups), range(4))]
        write_table(campaign.folder, "samples", number, table_from_rows("samples", [
            {"sample_id": one, "group_id": f"r{number}-g{g}", "member": m, "prompt": f"prompt {g}", "split": "train",
             "seed": g, "image_path": image, "trajectory_path": "t", "trajectory_row": 0, "checkpoint": None}
            for g, m, one in ids
        ]))  # fmt: skip
        people = [("proxy", "score", one, float(random.random())) for _, _, one in ids]
        people += [("human", "rating", one, float(m)) for g, m, one in ids if g % 5 == 0]
        write_table(campaign.folder, "judgements", number, table_from_rows("judgements", [
            {"rater": "brightness" if kind == "proxy" else "ann", "rater_kind": kind, "kind": what, "sample_id": one,
             "other_id": None, "value": value, "judged_at": NOON, "source": "test", "seconds": None, "position": None}
            for kind, what, one, value in people
        ]))  # fmt: skip
        write_table(campaign.folder, "preferences", number, table_from_rows("preferences", [
            {"pair_id": f"r{number}-p{g}", "group_id": f"r{number}-g{g}", "winner_id": f"r{number}-g{g}-m1",
             "loser_id": f"r{number}-g{g}-m0", "weight": 1.0, "num_raters": 1, "agreement": 1.0}
            for g in range(groups)
        ]))  # fmt: skip
    return "big"


def _first(name: str) -> float:
    """Seconds from the first request that the server accepts to the end of its answer."""
    for _ in range(300):
        try:
            return _ask(f"/c/{name}")
        except ConnectionRefusedError:
            time.sleep(0.1)
    raise SystemExit("the server did not start")


def _ask(path: str) -> float:
    started = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", PORT, timeout=120)
    connection.request("GET", path, headers={"cookie": "d3po_browse=key"})
    answer = connection.getresponse()
    answer.read()
    if answer.status != 200:
        raise SystemExit(f"{path}: HTTP {answer.status}")
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
