"""Lose machines at random moments: kill a run, delete its disk, go on in another folder from the mirror."""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

from d3po_core.mirror.holder import holder_of
from d3po_core.paths import PROJECT_ROOT

sys.path.insert(0, str(PROJECT_ROOT))
from tests.benchmarks.common import RESULTS, machine, write_json
from tests.flows.test_machine_loss import kept, mirrored

RUN = """import json, sys
from tests.flows.rounds_in_processes import run_rounds
run_rounds(json.loads(sys.argv[1]), int(sys.argv[2]), None, False)"""
PER_CAMPAIGN = 5
QUIET = {"DO_NOT_TRACK": "1", "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}


class Machines:
    """Runs in folders of their own, on one Prefect server; what they log goes to one file."""

    def __init__(self, home: Path, port: int, rounds: int) -> None:
        self.home, self.rounds, self.count = home, rounds, 0
        api = f"http://127.0.0.1:{port}/api"
        self.environment = {**os.environ, **QUIET, "PREFECT_HOME": str(home / "prefect"), "PREFECT_API_URL": api}
        self.environment["D3PO_DATA"] = str(home / "data")
        (home / "data").mkdir()  # runs note there which files they wrote
        self.log = (home / "log").open("wb")
        command = ["-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
        self.server = self._start(command)
        while not self._answers(f"{api}/health"):
            time.sleep(0.5)

    def _start(self, arguments: list[str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, *arguments], env=self.environment, cwd=PROJECT_ROOT, stdout=self.log, stderr=self.log,
            start_new_session=True,
        )  # fmt: skip

    def _answers(self, url: str) -> bool:
        try:
            return httpx.get(url, trust_env=False).is_success
        except httpx.HTTPError:
            return False

    def run(self, mirror: Path, lose_after: float | None) -> tuple[Path, int, float]:
        """Run on a new machine; kill it so many seconds after its first file. Returns folder, status and seconds."""
        self.count += 1
        runs = self.home / f"machine-{self.count}"
        values = mirrored(runs, mirror)
        process = self._start(["-c", RUN, json.dumps(values), str(self.rounds)])
        while process.poll() is None and not (runs / "lost" / ".lock").exists():
            time.sleep(0.05)
        began = time.monotonic()
        try:
            process.wait(lose_after)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return runs, process.returncode, time.monotonic() - began

    def close(self) -> None:
        """End the Prefect server."""
        os.killpg(self.server.pid, signal.SIGTERM)
        self.server.wait(30)


def lose(machines: Machines, losses: int, dice: random.Random) -> dict[str, Any]:
    """Lose machines until so many are lost; compare each campaign that was finished meanwhile."""
    first, _, seconds = machines.run(folder(machines, "undisturbed"), None)
    expected, lost, campaigns, differing, when = kept(first / "lost"), 0, 0, 0, []
    assert expected["rounds 1"], "the undisturbed run did not end; see the log"
    missed = 0
    while lost < losses:
        campaigns += 1
        mirror, in_this, left = folder(machines, f"campaign-{campaigns}"), 0, seconds
        while True:
            moment = dice.uniform(0, left) if lost < losses and in_this < PER_CAMPAIGN else None
            runs, status, lived = machines.run(mirror, moment)
            if status == 0:
                missed += moment is not None  # it ended first; the next campaign draws another moment
                if in_this == 0:  # a busy machine may have been slow at first, and every moment would be missed
                    seconds = min(seconds, lived)
                break
            if status == -signal.SIGKILL and was_at_work(runs / "lost", mirror, machines.rounds):
                lost, in_this, left = lost + 1, in_this + 1, max(left - lived, seconds / 4)
                when.append(last_record(mirror))
                print(f"loss {lost}: campaign {campaigns}, mirrored so far: {when[-1]}", flush=True)
            shutil.rmtree(runs)  # also of a machine that came before the lost one's lease ended
        same = kept(runs / "lost") == expected
        differing += not same
        print(f"campaign {campaigns}: {'the same bytes' if same else 'OTHER BYTES'}", flush=True)
    counts = {"losses": lost, "missed": missed, "campaigns": campaigns, "differing": differing}
    return {**counts, "mirrored_when_lost": when}


def was_at_work(campaign: Path, mirror: Path, rounds: int) -> bool:
    """Return whether a killed run had the campaign's lease, and work left: else killing it lost nothing."""
    leases = sorted(mirror.glob("lost/lease/*.json"))
    finished = (mirror / f"lost/records/round={rounds}/publish.json").exists()
    return bool(leases) and not finished and json.loads(leases[-1].read_text())["holder"] == holder_of(campaign)


def folder(machines: Machines, name: str) -> Path:
    """Return a new, empty mirror."""
    path = machines.home / name
    path.mkdir()
    return path


def last_record(mirror: Path) -> str:
    """Return the newest stage in a mirror."""
    found = sorted(mirror.glob("lost/records/*/*.json"), key=lambda path: path.stat().st_mtime_ns)
    return f"{found[-1].parent.name} {found[-1].stem}" if found else "nothing"


def main() -> None:
    """Print and write how many campaigns ended with the same bytes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--losses", type=int, default=25)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--port", type=int, default=47250, help="for the Prefect server, on the loopback interface")
    settings, before = parser.parse_args(), machine()
    home = Path(tempfile.mkdtemp(prefix="machine-loss-"))
    machines = Machines(home, settings.port, settings.rounds)
    try:
        results = lose(machines, settings.losses, random.Random(settings.seed))
    finally:
        machines.close()
    print(
        f"{results['losses']} machines lost at work, {results['missed']} moments missed, {results['campaigns']} "
        f"campaigns, {results['differing']} with other bytes"
    )
    write_json(RESULTS / "machine_loss.json", vars(settings), before, results)
    shutil.rmtree(home)
    raise SystemExit(1 if results["differing"] else 0)


if __name__ == "__main__":
    main()
