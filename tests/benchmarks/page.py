"""The labelling page: how fast a round of 10,000 images opens, and how fast a judgement is answered, 8 raters at once.

    python tests/benchmarks/page.py

Serves a round in a process of its own, as ``d3po label`` does, and talks to it over HTTP. A judgement's time goes from
the sending of the request to the end of the answer, which holds the next question; by then the judgement is on disk
(SQLite in WAL mode with a sync at every commit). The raters send as fast as they are answered, or at ``--pace``
seconds between an answer and the next judgement, as people would.
"""

import argparse
import concurrent.futures
import http.client
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

import numpy as np
from common import RESULTS, machine, write_json

from d3po_core.page.access import Raters
from d3po_core.paths import PROJECT_ROOT
from d3po_core.people.journal import read_entries, sampling_of
from d3po_core.people.questions import label_progress

SERVER = """
import sys, uvicorn
from pathlib import Path
from d3po_core.page.app import create_app
app = create_app(Path(sys.argv[1]), lambda *_: None, per_second=10_000.0)
uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[2]), log_level="error", access_log=False)
"""


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--group-size", type=int, default=4)
    parser.add_argument("--mode", default="mark_bad", choices=("mark_bad", "pair", "best", "rank"))
    parser.add_argument("--raters", type=int, default=8)
    parser.add_argument("--judgements", type=int, default=150, help="a rater")
    parser.add_argument("--pace", type=float, default=0.0, help="seconds between an answer and the next judgement")
    parser.add_argument("--repeats", type=int, default=5, help="openings, each by a fresh server")
    arguments = parser.parse_args()
    before = machine()
    sys.path.insert(0, str(PROJECT_ROOT))
    from tests.core.people.labelling import waiting_campaign

    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        data = Path(folder)
        groups = arguments.images // arguments.group_size
        print(f"writing {groups} groups of {arguments.group_size} images ...", flush=True)
        config = waiting_campaign(data, groups=groups, size=arguments.group_size, mode=arguments.mode, pixels=64,
                                  raters_per_group=arguments.raters)  # fmt: skip
        tokens = [Raters(data).token(f"rater{number}") for number in range(arguments.raters)]
        openings = [_opening(data, tokens[0]) for _ in range(arguments.repeats)]
        port, process = _serve(data)
        try:
            with concurrent.futures.ThreadPoolExecutor(arguments.raters) as pool:
                runs = [pool.submit(_judge, port, token, arguments) for token in tokens]
                seconds = [second for run in runs for second in run.result()]
        finally:
            process.terminate()
            process.wait()
        kept = len(read_entries(config.folder, str(sampling_of(config.folder, 1))))
        assert kept == len(seconds), f"{kept} kept of {len(seconds)} that were confirmed"
        started = time.perf_counter()
        label_progress(config, 1)
        progress_ms = 1000 * (time.perf_counter() - started)
    results: dict[str, Any] = {
        "open_s": _quantiles(openings), "judgement_ms": _quantiles([1000 * s for s in seconds]),
        "label_progress_ms": progress_ms, "judgements_kept": kept,
    }  # fmt: skip
    print(f"{'':24}{'p50':>9}{'p95':>9}{'max':>9}")
    for name, unit, key in (("round opens", "s", "open_s"), ("judgement is answered", "ms", "judgement_ms")):
        found = results[key]
        print(f"{name + ' ' + unit:24}" + "".join(f"{found[q]:9.3f}" for q in ("p50", "p95", "max")))
    print(f"label_progress of this round: {progress_ms:.0f} ms; {kept} judgements confirmed, as many on disk")
    write_json(RESULTS / "page.json", vars(arguments), before, results)


def _serve(data: Path) -> tuple[int, subprocess.Popen[bytes]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": str(PROJECT_ROOT)}
    process = subprocess.Popen([sys.executable, "-c", SERVER, str(data), str(port)], env=environment)
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return port, process
        except OSError:
            assert process.poll() is None, "the server did not start"
            time.sleep(0.02)


def _opening(data: Path, token: str) -> float:
    """Seconds from the first request for the round's page at a fresh server to its end."""
    port, process = _serve(data)
    try:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        started = time.perf_counter()
        connection.request("GET", "/c/x", headers={"cookie": f"d3po_label={token}"})
        text = connection.getresponse().read().decode()
        seconds = time.perf_counter() - started
        assert 'data-state="question"' in text
        return seconds
    finally:
        process.terminate()
        process.wait()


def _judge(port: int, token: str, arguments: argparse.Namespace) -> list[float]:
    """Seconds of each judgement of one rater, on one connection that stays open, as a browser's does."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    headers = {
        "cookie": f"d3po_label={token}",
        "origin": f"http://127.0.0.1:{port}",
        "content-type": "application/json",
    }
    size = 2 if arguments.mode == "pair" else arguments.group_size
    values = {"pair": [1, -1], "mark_bad": [0] + [1] * (size - 1), "best": [1] + [2] * (size - 1)}
    connection.request("GET", "/c/x/next", headers=headers)
    html = json.loads(connection.getresponse().read())["html"]
    seconds = []
    for _ in range(arguments.judgements):
        ticket = re.search(r'data-ticket="([^"]+)"', html)
        assert ticket, "the round ended before the measurement: fewer --judgements"
        content = {"ticket": ticket[1], "submission": uuid.uuid4().hex, "action": "answer", "seconds": 1.0,
                   "values": values.get(arguments.mode, list(range(1, size + 1)))}  # fmt: skip
        body = json.dumps(content)
        started = time.perf_counter()
        connection.request("POST", "/c/x/judge", body, headers)
        response = connection.getresponse()
        text = response.read()
        seconds.append(time.perf_counter() - started)
        assert response.status == 200, text
        html = json.loads(text)["html"]
        time.sleep(arguments.pace)
    return seconds


def _quantiles(values: list[float]) -> dict[str, float]:
    p50, p95 = np.quantile(values, [0.5, 0.95])
    return {"p50": float(p50), "p95": float(p95), "max": max(values), "repeats": len(values)}


if __name__ == "__main__":
    main()
