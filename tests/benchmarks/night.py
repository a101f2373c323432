"""An unattended night: scheduled rounds on real servers, two killed workers, an MLflow server that is down for a while.

    python tests/benchmarks/night.py [--runs 24]

Prefect server, worker, MLflow and page as ``d3po up`` starts them, in a folder of their own; rounds are told to MLflow
through its server. Runs of one round each of the deployment ``round`` are scheduled so close that they come to wait for
each other. Then this script only kills, and does what a cron job does: ``d3po up`` now and then. At the end every round
is looked for in the tables, in MLflow and in Prefect; with ``--undisturbed`` the checkpoints are compared with those
of a campaign left in peace.
"""

import argparse
import collections
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import psutil
from common import RESULTS, clean_environment, machine, write_json
from mlflow import MlflowClient

from d3po_core.paths import PROJECT_ROOT
from d3po_core.store.stages import finished_numbers
from d3po_core.store.tables import connect

BIN = Path(sys.executable).parent
CAMPAIGN = "shapes"
Results = dict[str, Any]


class Night:
    """Servers in a folder of their own, and what happens to them; times are seconds since the servers were up."""

    def __init__(self, data: Path) -> None:
        self.ports = dict(zip(("prefect", "mlflow", "label"), _free_ports(3), strict=True))
        self.environment = clean_environment(data) | {
            "PREFECT_HOME": str(data / "prefect-home"),  # whose profile `d3po up` changes
            "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{self.ports['mlflow']}",
        }
        self.data, self.campaign = data, data / "runs" / CAMPAIGN
        self.started, self.events = time.monotonic(), []  # type: float, list[str]

    def note(self, what: str) -> None:
        """Print and keep what happened."""
        self.events.append(f"{time.monotonic() - self.started:6.0f} s  {what}")
        print(self.events[-1], flush=True)

    def command(self, *arguments: str) -> str:
        """Run a command of the project's environment; what it printed."""
        program = str(BIN / arguments[0])
        done = subprocess.run(
            [program, *arguments[1:]], env=self.environment, cwd=PROJECT_ROOT, capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"{' '.join(arguments)}: {done.stdout}{done.stderr}")
        return done.stdout

    def up(self) -> None:
        """What the cron job types."""
        ports = [part for name, port in self.ports.items() for part in (f"--{name}-port", str(port))]
        lines = self.command("d3po", "up", *ports).splitlines()
        self.note("d3po up: " + "; ".join(line for line in lines if "started" in line or "crash" in line.lower()))

    def pid(self, name: str) -> int:
        """Process id of a server."""
        (line,) = [line for line in self.command("d3po", "status").splitlines() if line.startswith(f"{name}:")]
        return int(line.split("pid ")[1].split(")")[0])

    def kill(self, name: str, with_run: bool = False) -> None:
        """SIGKILL to a server; with the process of the run that it works on."""
        os.kill(self.pid(name), signal.SIGKILL)
        runs = [pid for pid in _flow_processes(self.environment["D3PO_DATA"]) if with_run]
        for pid in runs:
            os.kill(pid, signal.SIGKILL)
        self.note(f"kill -9 {name}" + (f" and the run's {len(runs)} process(es)" if with_run else ""))

    def ask(self, path: str, body: Results) -> Any:
        """Answer of Prefect's API."""
        url = f"http://127.0.0.1:{self.ports['prefect']}/api{path}"
        while (answer := httpx.post(url, json=body, timeout=60)).status_code == 503:
            time.sleep(1)  # its database is busy, and it asks to be asked again, as Prefect's own clients do
        return answer.raise_for_status().json()

    def states(self) -> dict[str, int]:
        """Runs of the deployment that are not of its nightly schedule, by the name of their state."""
        body = {"deployments": {"name": {"any_": ["round"]}}, "flow_runs": {"tags": {"all_": ["night"]}}}
        return dict(collections.Counter(run["state"]["name"] for run in self.ask("/flow_runs/filter", body)))

    def schedule(self, count: int, every: float) -> None:
        """Schedule runs of one round each; those that come while another runs are queued by Prefect."""
        url = f"http://127.0.0.1:{self.ports['prefect']}/api/deployments/name/d3po/round"
        deployment = httpx.get(url, timeout=60).raise_for_status().json()["id"]
        now = datetime.now(UTC)
        for index in range(count):
            at = {"scheduled_time": (now + timedelta(seconds=every * index)).isoformat()}
            body = {"parameters": {"rounds": 1}, "tags": ["night"], "state": {"type": "SCHEDULED", "state_details": at}}
            self.ask(f"/deployments/{deployment}/create_flow_run", body)
        self.note(f"{count} runs of one round scheduled, {every:.0f} s apart")

    def wait_for_round(self, number: int) -> None:
        """Until a round is finished."""
        while not self.campaign.exists() or max(finished_numbers(self.campaign), default=-1) < number:
            time.sleep(0.5)
        self.note(f"round {number} finished")

    def wait_for_rest(self, minutes: float) -> None:
        """Until no run is left to run."""
        deadline = time.monotonic() + 60 * minutes
        while set(self.states()) - {"Completed", "Crashed", "Failed"} and time.monotonic() < deadline:
            time.sleep(2)
        self.note(f"runs by state: {self.states()}")


def main() -> None:
    """Live through the night, account for its rounds."""
    arguments = _arguments()
    before = machine()
    with tempfile.TemporaryDirectory(prefix="d3po-night-") as temporary:
        night = Night(Path(temporary))
        try:
            with _servers(night):
                night.schedule(arguments.runs, arguments.every)
                disturb(night)
                night.wait_for_rest(minutes=arguments.runs)
                results = account(night)
        finally:
            night.command("d3po", "down")
        if arguments.undisturbed:
            results["same as undisturbed"] = compare(night, Path(temporary) / "undisturbed")
    for name, value in results.items():
        print(f"{name}: {value}")
    write_json(arguments.output, vars(arguments), before, results | {"events": night.events})


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=24, help="runs to schedule, of one round each, at least 16 (24)")
    parser.add_argument("--every", type=float, default=25, help="seconds between their scheduled times (25)")
    parser.add_argument("--undisturbed", action="store_true", help="afterwards the same rounds in peace, to compare")
    parser.add_argument("--output", type=Path, default=RESULTS / "night.json", help="JSON file")
    return parser.parse_args()


@contextmanager
def _servers(night: Night) -> Iterator[None]:
    night.up()
    night.started = time.monotonic()
    yield


def disturb(night: Night) -> None:
    """Kill, and start again what was killed."""
    night.wait_for_round(3)
    night.kill("worker")
    time.sleep(5)
    night.up()
    night.wait_for_round(7)
    night.kill("mlflow")
    night.wait_for_round(10)
    night.up()
    night.wait_for_round(12)
    time.sleep(3)  # into the next round
    night.kill("worker", with_run=True)
    time.sleep(5)
    night.up()


def account(night: Night) -> Results:
    """Where each round is: in the tables, in MLflow, in Prefect."""
    numbers = finished_numbers(night.campaign)
    with connect(night.campaign) as connection:
        rows = connection.sql("SELECT count(*), count(DISTINCT round), max(round) FROM rounds").fetchall()[0]
        doubled = connection.sql("SELECT count(*) - count(DISTINCT sample_id) FROM samples").fetchall()[0][0]
    client = MlflowClient(tracking_uri=f"sqlite:///{night.data / 'mlflow' / 'mlflow.db'}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = [
        run
        for run in client.search_runs(experiments, max_results=1000)
        if run.data.tags.get("d3po.round", "").isdigit()
    ]
    told = collections.Counter(int(run.data.tags["d3po.round"]) for run in runs)
    complete = [
        int(run.data.tags["d3po.round"])
        for run in runs
        if run.info.status == "FINISHED" and "held_out/prompt_alignment" in run.data.metrics
    ]
    versions = client.search_model_versions(f"name = 'd3po-{CAMPAIGN}'")
    return {
        "rounds finished": f"{len(numbers) - 1} and the base, without a gap: {numbers == list(range(len(numbers)))}",
        "rows of rounds, distinct, last": list(rows),
        "samples kept twice": doubled,
        "MLflow runs of rounds, finished and with a held-out score": f"{len(runs)}, {len(complete)}",
        "rounds missing or doubled in MLflow": [number for number in numbers if told[number] != 1],
        "versions of the registered model": len(versions),
        "Prefect runs by state": night.states(),
        "minutes": round((time.monotonic() - night.started) / 60, 1),
    }


def compare(night: Night, data: Path) -> str:
    """Checkpoints of the same rounds by one command in peace."""
    last = max(finished_numbers(night.campaign))
    command = [str(BIN / "d3po"), "run", "round", "--rounds", str(last)]
    subprocess.run(command, env=clean_environment(data), cwd=PROJECT_ROOT, check=True, capture_output=True)
    digests = []
    for campaign in (night.campaign, data / "runs" / CAMPAIGN):
        with connect(campaign) as connection:
            digests.append(connection.sql("SELECT round, lora_sha256 FROM rounds ORDER BY round").fetchall())
    same = sum(ours == theirs for ours, theirs in zip(*digests, strict=True))
    return f"{same} of {len(digests[0])} checkpoints, byte for byte"


def _free_ports(count: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def _flow_processes(data: str) -> list[int]:
    """Processes of flow runs whose data lies in that folder."""
    found = []
    for process in psutil.process_iter():
        try:
            environment = process.environ()
        except (psutil.Error, OSError):
            continue
        if environment.get("D3PO_DATA") == data and "PREFECT__FLOW_RUN_ID" in environment:
            found.append(process.pid)
    return found


if __name__ == "__main__":
    main()
