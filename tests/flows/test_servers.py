"""Real servers on free ports, in a temporary data folder and with a home of their own."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml

from d3po_core.campaign import finished_rounds
from d3po_core.config import PROJECT_ROOT, PUBLISHED, load_config
from d3po_core.errors import D3POError
from flows import servers

pytestmark = pytest.mark.timeout(300)


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A data folder and a Prefect home whose active profile is one of the user's own."""
    folder = tmp_path_factory.mktemp("servers")
    (folder / "home").mkdir()
    (folder / "home" / "profiles.toml").write_text(
        'active = "mine"\n\n[profiles.mine]\nPREFECT_LOGGING_LEVEL = "INFO"\n'
    )
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("PREFECT_", "MLFLOW_"))]:
            patch.delenv(name)
        patch.setenv("HOME", str(folder))
        patch.setenv("PREFECT_HOME", str(folder / "home"))
        patch.setenv("D3PO_DATA", str(folder / "data"))
        patch.setenv("PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS", "1")
        yield folder
        for started in folder.glob("*/servers/servers.json"):  # by a test that failed
            patch.setenv("D3PO_DATA", str(started.parent.parent))
            servers.down()


@pytest.fixture(scope="module")
def ports(home: Path) -> Iterator[dict[str, int]]:
    """Ports of servers that run; whatever a test left behind is ended."""
    prefect, mlflow, label = free_ports(3)
    try:
        servers.up(prefect, mlflow, label)
        yield {"prefect": prefect, "mlflow": mlflow, "label": label}
    finally:
        servers.down()


def pids(home: Path) -> dict[str, int]:
    processes = json.loads((home / "data" / "servers" / "servers.json").read_text())["processes"]
    return {name: record["pid"] for name, record in processes.items()}


def active_profile(home: Path) -> str:
    return tomllib.loads((home / "home" / "profiles.toml").read_text())["active"]


def post(ports: dict[str, int], path: str, body: dict[str, Any]) -> Any:
    url = f"http://127.0.0.1:{ports['prefect']}/api{path}"
    for _ in range(10):
        answer = httpx.post(url, json=body, timeout=30)
        if answer.status_code != 503:  # its database is busy, and it asks to be asked again
            break
        time.sleep(1)
    return answer.raise_for_status().json()


def get(ports: dict[str, int], path: str) -> Any:
    return httpx.get(f"http://127.0.0.1:{ports['prefect']}/api{path}", timeout=30).raise_for_status().json()


def eventually(found: Callable[[], Any], seconds: float = 60) -> Any:
    """What is found at last; a server that is too busy to answer is asked again."""
    deadline = time.monotonic() + seconds
    result = None
    while not result and time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            result = found()
        if not result:
            time.sleep(0.2)
    return result


def make_running(ports: dict[str, int]) -> str:
    """A flow run that the server believes to be running; call it while no worker could pick it up."""
    deployment = get(ports, "/deployments/name/d3po/published")["id"]
    run_id = post(ports, f"/deployments/{deployment}/create_flow_run", {})["id"]
    post(ports, f"/flow_runs/{run_id}/set_state", {"state": {"type": "RUNNING"}, "force": True})
    return run_id


def test_up_registers_both_presets(ports: dict[str, int], home: Path) -> None:
    listed = subprocess.run(
        [sys.executable, "-m", "prefect", "deployment", "ls"], cwd=home, capture_output=True, text=True, check=True
    ).stdout
    assert "d3po/round" in listed
    assert "d3po/published" in listed
    deployment = get(ports, "/deployments/name/d3po/round")
    assert deployment["work_pool_name"] == "d3po"
    assert deployment["global_concurrency_limit"]["limit"] == 1
    assert deployment["concurrency_options"]["collision_strategy"] == "ENQUEUE"
    assert deployment["pull_steps"][0]["prefect.deployments.steps.set_working_directory"]["directory"] == str(
        PROJECT_ROOT
    )


def test_nightly_schedule_creates_runs(ports: dict[str, int]) -> None:
    body = {
        "flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}},
        "deployments": {"name": {"any_": ["round"]}},
    }
    runs = eventually(lambda: post(ports, "/flow_runs/filter", body))
    assert runs, "the scheduler created no runs; is SQLAlchemy older than 2.1?"
    assert {run["expected_start_time"][11:16] for run in runs} == {"02:00"}
    assert all(run["auto_scheduled"] for run in runs)


def test_one_run_at_a_time_holds_the_gpu(ports: dict[str, int]) -> None:
    assert get(ports, "/v2/concurrency_limits/gpu")["limit"] == 1


def flow_process(run_id: str) -> psutil.Process | None:
    """The process in which a worker runs a flow run."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get("PREFECT__FLOW_RUN_ID") == run_id and "prefect.engine" in " ".join(
                process.cmdline()
            ):
                return process
    return None


def test_killed_deployment_run_finishes_when_it_is_retried(ports: dict[str, int], home: Path) -> None:
    prefect = [sys.executable, "-m", "prefect", "--no-prompt"]
    config = {"campaign": "nightly", "sample": {"groups_per_round": 4}, "evaluate": {"images_per_prompt": 1}}
    parameters = ["-p", "rounds=1", "-p", f"config={json.dumps(config)}"]
    subprocess.run(
        [*prefect, "deployment", "run", "d3po/round", *parameters], cwd=home, check=True, capture_output=True
    )
    listed = {"flow_runs": {"name": {"any_": ["nightly"]}}}
    campaign = home / "data" / "runs" / "nightly"
    assert eventually(lambda: (campaign / "stages" / "round=1" / "sample.json").exists(), 180)
    (run,) = eventually(lambda: post(ports, "/flow_runs/filter", listed))
    process = flow_process(run["id"])
    assert process, "the run ended before it could be killed"
    process.kill()
    assert eventually(lambda: get(ports, f"/flow_runs/{run['id']}")["state_type"] == "CRASHED")
    # The worker notices the death some ten seconds after the runner, and would crash a run that was retried before.
    log = home / "data" / "servers" / "worker.log"
    assert eventually(lambda: "prefect.flow_runs.worker - Check whether the flow run" in log.read_text())
    assert not (campaign / "rounds" / "round=1").exists()
    sampled = (campaign / "stages" / "round=1" / "sample.json").read_bytes()
    subprocess.run([*prefect, "flow-run", "retry", run["id"]], cwd=home, check=True, capture_output=True)
    assert eventually(lambda: get(ports, f"/flow_runs/{run['id']}")["state_type"] == "COMPLETED", 180)
    assert [record.round for record in finished_rounds(campaign)] == [0, 1]
    assert (campaign / "stages" / "round=1" / "sample.json").read_bytes() == sampled, "a finished stage ran again"
    # The MLflow server shows what the worker wrote straight to the store.
    url, child = f"http://127.0.0.1:{ports['mlflow']}", finished_rounds(campaign)[1].mlflow_run_id
    grid = httpx.get(f"{url}/get-artifact", params={"path": "grid.png", "run_uuid": child}, timeout=30)
    assert grid.content == (campaign / "images" / "round=1" / "grid.png").read_bytes()


def test_mlflow_keeps_runs_and_artifacts_in_the_data_folder(ports: dict[str, int], home: Path) -> None:
    url = f"http://127.0.0.1:{ports['mlflow']}/api/2.0"
    created = httpx.post(f"{url}/mlflow/experiments/create", json={"name": "probe"}, timeout=30).raise_for_status()
    path = f"mlflow-artifacts/artifacts/{created.json()['experiment_id']}/note.txt"
    httpx.put(f"{url}/{path}", content=b"kept", timeout=30).raise_for_status()
    assert (home / "data" / "mlflow" / "mlflow.db").exists()
    assert [file.read_bytes() for file in (home / "data" / "mlflow" / "artifacts").rglob("note.txt")] == [b"kept"]


def test_plain_prefect_commands_reach_the_server(ports: dict[str, int], home: Path) -> None:
    profiles = tomllib.loads((home / "home" / "profiles.toml").read_text())
    assert profiles["active"] == "d3po"
    assert profiles["profiles"]["d3po"]["PREFECT_API_URL"] == f"http://127.0.0.1:{ports['prefect']}/api"
    assert profiles["profiles"]["mine"] == {"PREFECT_LOGGING_LEVEL": "INFO"}


def test_second_up_changes_nothing(ports: dict[str, int], home: Path) -> None:
    before = (home / "data" / "servers" / "servers.json").read_text()
    assert "everything is already running" in servers.up(*ports.values())
    assert (home / "data" / "servers" / "servers.json").read_text() == before


def test_other_ports_are_refused_politely_while_servers_run(ports: dict[str, int], home: Path) -> None:
    before = pids(home)
    lines = servers.up(ports["prefect"] + 1, ports["mlflow"], ports["label"])
    assert any("d3po down" in line for line in lines)
    assert f"Prefect: http://127.0.0.1:{ports['prefect']}" in lines
    assert pids(home) == before


def test_killed_worker_is_started_again_and_lost_runs_crash(ports: dict[str, int], home: Path) -> None:
    before = pids(home)
    os.kill(before["worker"], signal.SIGKILL)
    assert eventually(lambda: any(line.startswith("worker: not running") for line in servers.status()))
    lost, living = make_running(ports), make_running(ports)
    marks = {
        "PREFECT__FLOW_RUN_ID": living,
        "PREFECT_API_URL": f"http://127.0.0.1:{ports['prefect']}/api",
        "D3PO_DATA": str(home / "data"),
    }
    waiting = [sys.executable, "-c", "import time; time.sleep(600)"]
    with subprocess.Popen(waiting, env=os.environ | marks, start_new_session=True) as process:
        try:
            lines = servers.up(*ports.values())
            states = {run_id: get(ports, f"/flow_runs/{run_id}")["state"]["type"] for run_id in (lost, living)}
        finally:
            process.kill()
    assert "started: worker" in lines
    assert [line for line in lines if "Crashed" in line] == [
        f"{lost}: lost, now Crashed; to go on: prefect flow-run retry {lost}"
    ]
    assert states == {lost: "CRASHED", living: "RUNNING"}
    after = pids(home)
    assert after["worker"] != before["worker"]
    assert {**after, "worker": 0} == {**before, "worker": 0}


def test_killed_server_is_started_again_on_its_port(ports: dict[str, int], home: Path) -> None:
    before = pids(home)
    children = psutil.Process(before["mlflow"]).children(recursive=True)
    assert children, "the server was expected to have children that outlive it"
    os.kill(before["mlflow"], signal.SIGKILL)
    assert eventually(lambda: any(line.startswith("mlflow: not running") for line in servers.status()))
    assert "started: mlflow" in servers.up(*ports.values())
    assert httpx.get(f"http://127.0.0.1:{ports['mlflow']}/health", timeout=30).is_success
    assert [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE] == []
    assert {**pids(home), "mlflow": 0} == {**before, "mlflow": 0}


def test_down_ends_every_process_and_restores_the_profile(ports: dict[str, int], home: Path) -> None:
    roots = [psutil.Process(pid) for pid in pids(home).values()]
    family = [*roots, *(child for root in roots for child in root.children(recursive=True))]
    assert len(roots) == 4
    lines = servers.down()
    assert [line.partition(":")[0] for line in lines if "ended" in line] == ["worker", "label", "mlflow", "prefect"]
    assert [process for process in family if process.is_running() and process.status() != psutil.STATUS_ZOMBIE] == []
    assert active_profile(home) == "mine"
    assert servers.down() == ["nothing to end: no servers are running"]
    assert active_profile(home) == "mine"


def test_down_leaves_a_process_alone_that_got_a_recorded_pid(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("D3PO_DATA", str(home / "other"))
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as stranger:
        try:
            (home / "other" / "servers").mkdir(parents=True)
            record = {"pid": stranger.pid, "created": psutil.Process(stranger.pid).create_time() - 60}
            state = {"ports": {"prefect": 1, "mlflow": 2}, "processes": {"worker": record}}
            (home / "other" / "servers" / "servers.json").write_text(json.dumps(state))
            assert servers.down() == ["nothing to end: no servers are running"]
            assert stranger.poll() is None
        finally:
            stranger.kill()


@pytest.mark.parametrize("taken", ["prefect", "mlflow"])
def test_busy_port_is_one_line_that_names_port_and_option(
    home: Path, monkeypatch: pytest.MonkeyPatch, taken: str
) -> None:
    monkeypatch.setenv("D3PO_DATA", str(home / "unused"))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port, free = other.getsockname()[1], free_ports(1)[0]
        with pytest.raises(D3POError) as caught:
            servers.up(*((port, free) if taken == "prefect" else (free, port)))
    assert str(port) in str(caught.value)
    assert f"--{taken}-port" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (home / "unused").exists()


def test_data_folder_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("D3PO_DATA", str(tmp_path / "file"))
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with pytest.raises(D3POError, match=r"cannot write .*; make its folder writable, or set D3PO_DATA"):
        servers.up(*free_ports(3))
    assert servers.down() == ["nothing to end: no servers are running"]


@pytest.mark.parametrize(
    ("name", "value"), [("PREFECT_API_URL", "http://example.invalid/api"), ("PREFECT_PROFILE", "cloud")]
)
def test_shell_set_to_another_server_is_refused(
    home: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv("D3PO_DATA", str(home / "unused"))
    monkeypatch.setenv(name, value)
    with pytest.raises(D3POError, match=f"{name} is set to '{value}'.*unset {name}"):
        servers.up(*free_ports(3))
    assert not (home / "unused").exists()


def test_presets_are_valid_and_published_is_the_published_code() -> None:
    presets = {
        entry["name"]: entry for entry in yaml.safe_load((PROJECT_ROOT / "prefect.yaml").read_text())["deployments"]
    }
    assert presets["round"]["schedules"][0]["cron"] == "0 2 * * *"
    assert "schedules" not in presets["published"]
    values = presets["published"]["parameters"]["config"]
    config = load_config(values, "prefect.yaml").model_dump()
    for section, switches in PUBLISHED.items():
        assert {name: config[section][name] for name in switches} == switches
    assert (config["campaign"], config["sample"]["groups_per_round"]) == ("shapes-published", 64)


def test_constraints_keep_prefect_working() -> None:
    lines = (PROJECT_ROOT / "constraints.txt").read_text().splitlines()
    pins = {name.lower(): version for name, found, version in (line.partition("==") for line in lines) if found}
    assert tuple(map(int, pins["sqlalchemy"].split(".")[:2])) < (2, 1), "Prefect would silently create no runs"
    assert tuple(map(int, pins["fastapi"].split(".")[:2])) < (0, 151), "the Prefect server would answer 422"
