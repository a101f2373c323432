"""Real servers on free ports, in a data folder with an odd name, a home of their own, and a proxy that is not there."""

import json
import os
import signal
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from d3po.flows import servers
from d3po.flows.server_files import read_state
from d3po.flows.server_processes import family, leader
from d3po.flows.server_programs import NAMES
from d3po.tasks.nights import skip_missed_nights
from d3po_core.config import PUBLISHED
from d3po_core.config_values import load_config
from d3po_core.errors import D3POError
from d3po_core.paths import PROJECT_ROOT
from d3po_core.store.stages import finished_rounds
from tests.flows.real_servers import (
    DATA,
    active_profile,
    call,
    deployment_parameters,
    eventually,
    flow_process,
    free_ports,
    get,
    login,
    make_running,
    pids,
    post,
    shell,
    stranger,
)

pytestmark = pytest.mark.timeout(300)


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
        patch.setenv("D3PO_DATA", str(folder / DATA))
        for name in ("http_proxy", "HTTP_PROXY"):
            patch.setenv(name, "http://127.0.0.1:9")
        for name in ("no_proxy", "NO_PROXY"):
            patch.delenv(name, raising=False)
        patch.setenv("PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS", "1")
        yield folder
        for started in folder.glob("*/servers"):  # by a test that failed
            patch.setenv("D3PO_DATA", str(started.parent))
            servers.down()


@pytest.fixture(scope="module")
def ports(home: Path) -> Iterator[dict[str, int]]:
    """Ports of servers that run, begun by two `up` at once; whatever a test left behind is ended."""
    ports = dict(zip(("prefect", "mlflow", "label"), free_ports(3), strict=True))
    options = [text for name, port in ports.items() for text in (f"--{name}-port", str(port))]
    command = [sys.executable, "-c", "from d3po.flows.commands.line import main; main()", "up", *options]
    try:
        both = [subprocess.Popen(command, cwd=PROJECT_ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        said = [one.communicate(timeout=200)[0] for one in both]
        assert [one.returncode for one in both] == [0, 0]
        assert sorted(text.count("started: prefect, mlflow, label, worker") for text in said) == [0, 1]
        assert sorted(text.count("everything is already running") for text in said) == [0, 1]
        yield ports
    finally:
        servers.down()


def test_up_registers_both_presets(ports: dict[str, int]) -> None:
    listed = post(ports, "/deployments/filter", {})
    assert {"round", "published"} <= {deployment["name"] for deployment in listed}
    deployment = get(ports, "/deployments/name/d3po/round")
    assert deployment["work_pool_name"] == "d3po"
    assert deployment["global_concurrency_limit"]["limit"] == 1
    assert deployment["concurrency_options"]["collision_strategy"] == "ENQUEUE"
    assert deployment["pull_steps"][0]["prefect.deployments.steps.set_working_directory"]["directory"] == str(
        PROJECT_ROOT
    )


def test_nothing_runs_at_night_until_somebody_asks(ports: dict[str, int]) -> None:
    (schedule,) = get(ports, "/deployments/name/d3po/round")["schedules"]
    assert (schedule["active"], schedule["schedule"]["cron"]) == (False, "0 2 * * *")
    assert "nothing runs at night; for one round per night: d3po up --nightly round" in servers.up()
    paused = f"/deployments/{get(ports, '/deployments/name/d3po/published')['id']}"
    call(ports, "PATCH", paused, {"paused": True})  # as an automation does
    (line,) = [line for line in servers.up(nightly=["round", "published"]) if line.startswith("on a schedule: ")]
    assert "published (cron 0 2 * * * UTC), round (cron 0 2 * * * UTC)" in line
    for name in ("round", "published"):  # the second has no schedule in prefect.yaml
        filters = {"flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}, "deployments": {"name": {"any_": [name]}}}
        runs = eventually(lambda body=filters: post(ports, "/flow_runs/filter", body))
        assert runs, "the scheduler created no runs; is SQLAlchemy older than 2.1?"
        assert {run["expected_start_time"][11:16] for run in runs} == {"02:00"}
        assert all(run["auto_scheduled"] for run in runs)
    published = get(ports, "/deployments/name/d3po/published")
    call(ports, "DELETE", f"/deployments/{published['id']}/schedules/{published['schedules'][0]['id']}")
    with pytest.raises(D3POError, match=r"--nightly nope: no such deployment of rounds .* it has round, published"):
        servers.up(nightly=["nope"])


def test_one_run_at_a_time_holds_the_gpu(ports: dict[str, int]) -> None:
    assert get(ports, "/v2/concurrency_limits/gpu")["limit"] == 1


def test_killed_deployment_run_finishes_when_it_is_retried(ports: dict[str, int], home: Path) -> None:
    prefect = [sys.executable, "-m", "prefect", "--no-prompt"]
    config = {"campaign": "nightly", "sample": {"groups_per_round": 4}, "evaluate": {"images_per_prompt": 1}}
    parameters = ["-p", "rounds=1", "-p", f"config={json.dumps(config)}"]
    subprocess.run(
        [*prefect, "deployment", "run", "d3po/round", *parameters],
        cwd=home, env=shell(), check=True, capture_output=True,
    )  # fmt: skip
    listed = {"flow_runs": {"name": {"any_": ["nightly: round 1"]}}}
    campaign = home / DATA / "runs" / "nightly"
    assert eventually(lambda: (campaign / "stages" / "round=1" / "sample.json").exists(), 180)
    (run,) = eventually(lambda: post(ports, "/flow_runs/filter", listed))
    assert run["tags"] == ["campaign:nightly", "deployment:round", "labeller:proxy"]
    process = flow_process(run["id"])
    assert process, "the run ended before it could be killed"
    process.kill()
    assert eventually(lambda: get(ports, f"/flow_runs/{run['id']}")["state_type"] == "CRASHED")
    assert not (campaign / "rounds" / "round=1").exists()
    sampled = (campaign / "stages" / "round=1" / "sample.json").read_bytes()
    subprocess.run([*prefect, "flow-run", "retry", run["id"]], cwd=home, env=shell(), check=True, capture_output=True)
    assert eventually(lambda: get(ports, f"/flow_runs/{run['id']}")["state_type"] == "COMPLETED", 180)
    assert get(ports, f"/flow_runs/{run['id']}")["name"] == "nightly: round 1"
    assert [record.round for record in finished_rounds(campaign)] == [0, 1]
    assert (campaign / "stages" / "round=1" / "sample.json").read_bytes() == sampled, "a finished stage ran again"
    # The MLflow server shows what the worker wrote straight to the store.
    url, child = f"http://127.0.0.1:{ports['mlflow']}", finished_rounds(campaign)[1].mlflow_run_id
    grid = httpx.get(f"{url}/get-artifact", params={"path": "grid.png", "run_uuid": child}, timeout=30, trust_env=False)
    assert grid.content == (campaign / "images" / "round=1" / "grid.png").read_bytes()


def test_mlflow_keeps_runs_and_artifacts_in_the_data_folder(ports: dict[str, int], home: Path) -> None:
    url = f"http://127.0.0.1:{ports['mlflow']}/api/2.0"
    created = httpx.post(
        f"{url}/mlflow/experiments/create", json={"name": "probe"}, timeout=30, trust_env=False
    ).raise_for_status()
    path = f"mlflow-artifacts/artifacts/{created.json()['experiment_id']}/note.txt"
    httpx.put(f"{url}/{path}", content=b"kept", timeout=30, trust_env=False).raise_for_status()
    assert (home / DATA / "mlflow" / "mlflow.db").exists()
    assert [file.read_bytes() for file in (home / DATA / "mlflow" / "artifacts").rglob("note.txt")] == [b"kept"]


def test_plain_prefect_commands_reach_the_server(ports: dict[str, int], home: Path) -> None:
    profiles = tomllib.loads((home / "home" / "profiles.toml").read_text())
    assert profiles["active"] == "d3po"
    assert profiles["profiles"]["d3po"]["PREFECT_API_URL"] == f"http://127.0.0.1:{ports['prefect']}/api"
    assert profiles["profiles"]["d3po"]["PREFECT_API_AUTH_STRING"] == ":".join(login(home))
    assert (home / "home" / "profiles.toml").stat().st_mode & 0o777 == 0o600
    assert profiles["profiles"]["mine"] == {"PREFECT_LOGGING_LEVEL": "INFO"}


def test_second_up_changes_nothing(ports: dict[str, int], home: Path) -> None:
    before = (home / DATA / "servers" / "servers.json").read_text()
    assert "everything is already running" in servers.up(*ports.values())
    assert (home / DATA / "servers" / "servers.json").read_text() == before


def test_other_ports_are_refused_politely_while_servers_run(ports: dict[str, int], home: Path) -> None:
    before = pids()
    lines = servers.up(ports["prefect"] + 1, ports["mlflow"], ports["label"])
    assert any("d3po down" in line for line in lines)
    assert f"Prefect: http://127.0.0.1:{ports['prefect']}" in lines
    assert pids() == before


WRITES = {
    "prefect": ("/api/flows/", "/api/deployments/", "/api/flow_runs/", "/api/work_pools/", "/api/deployments/filter"),
    "mlflow": (
        "/api/2.0/mlflow/experiments/create",
        "/ajax-api/2.0/mlflow/runs/create",
        "/ajax-api/2.0/mlflow/runs/search",
    ),
    "label": ("/judge", "/undo"),
}


@pytest.mark.parametrize("server", WRITES)
def test_page_elsewhere_is_refused(ports: dict[str, int], server: str) -> None:
    port = ports[server]
    own = {"Origin": f"http://127.0.0.1:{port}"}
    for path in WRITES[server]:
        for origin in ("http://evil.example", f"http://evil.example:{port}", "null"):
            asks = {"Origin": origin, "Access-Control-Request-Method": "POST"}
            asks["Access-Control-Request-Headers"] = "content-type"
            assert stranger(ports, server, "OPTIONS", path, headers=asks) in (400, 403, 405), (path, origin)
            for kind in ("text/plain", "application/json"):  # the first is sent without asking before
                sent = {"Origin": origin, "Content-Type": kind}
                assert stranger(ports, server, "POST", path, headers=sent, content="{}") == 403, (path, origin, kind)
        for host in (f"evil.example:{port}", f"127.0.0.1.evil.example:{port}", "192.168.0.7"):  # a name that leads here
            for headers in ({"Host": host}, {"Host": host, "Origin": f"http://{host}"}):
                headers["Content-Type"] = "application/json"
                assert stranger(ports, server, "POST", path, headers=headers, content="{}") in (400, 403), (path, host)
    assert stranger(ports, server, "GET", "/", headers={"Host": f"evil.example:{port}"}) in (400, 403)
    assert stranger(ports, server, "GET", "/health" if server != "prefect" else "/", headers=own) == 200


def test_prefect_lets_in_its_own_page_with_the_login_and_nobody_without(ports: dict[str, int], home: Path) -> None:
    secret = login(home)
    for name in ("127.0.0.1", "localhost"):
        headers = {"Origin": f"http://{name}:{ports['prefect']}", "Host": f"{name}:{ports['prefect']}"}
        asks = headers | {
            "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type",
        }  # fmt: skip
        assert stranger(ports, "prefect", "OPTIONS", "/api/flow_runs/filter", headers=asks) == 200
        for auth, status in ((secret, 200), (None, 401), (("d3po", "guess"), 401)):
            found = stranger(ports, "prefect", "POST", "/api/flow_runs/filter", headers=headers, json={}, auth=auth)
            assert found == status
    asked = httpx.get(f"http://127.0.0.1:{ports['prefect']}/ui-settings", timeout=30, trust_env=False).json()
    assert asked["auth"] == "BASIC", "its page would not ask for the login"


def test_what_servers_keep_is_private_and_the_login_is_nowhere_else(ports: dict[str, int], home: Path) -> None:
    folder, secret = home / DATA / "servers", login(home)[1]
    assert folder.stat().st_mode & 0o777 == (home / DATA / "prefect").stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o077 for path in folder.glob("*.log")} == {0}
    assert (folder / "prefect-login").stat().st_mode & 0o777 == 0o600
    kept = [path for path in (home / DATA).rglob("*") if path.is_file() and path.name != "prefect-login"]
    assert {"label.log", "prefect.db", "mlflow.db"} <= {path.name for path in kept}
    assert [path for path in kept if secret.encode() in path.read_bytes()] == []
    lines = [" ".join(process.cmdline()) for name in NAMES for process in family(name)]
    assert len(lines) >= len(NAMES)
    assert [line for line in lines if secret in line] == [], "all users can read command lines"
    mlflow = leader("mlflow")
    assert mlflow
    assert "PREFECT_API_AUTH_STRING" not in mlflow.environ()
    assert [path.name for path in home.iterdir() if path.name.startswith("da")] == [DATA], "a database went elsewhere"


@pytest.mark.parametrize(
    "text", ["", "[]", '{"ports":{}}', '{"ports":[1],"processes":{"worker":{"pid":-1}}}', "{", None]
)
def test_servers_are_known_whatever_servers_json_holds(ports: dict[str, int], home: Path, text: str | None) -> None:
    file = home / DATA / "servers" / "servers.json"
    before = file.read_text()
    file.unlink()
    try:
        file.mkdir() if text is None else file.write_text(text)
        running = [line for line in servers.status() if ": running" in line]
        assert [line.partition(":")[0] for line in running] == list(NAMES)
        assert f"mlflow: running http://127.0.0.1:{ports['mlflow']} (pid" in "\n".join(running)
        assert servers.prefect_url() == f"http://127.0.0.1:{ports['prefect']}/api"
    finally:
        file.rmdir() if text is None else file.unlink()
        file.write_text(before)


def test_servers_are_known_when_their_folder_is_gone(ports: dict[str, int], home: Path) -> None:
    folder = (home / DATA / "servers").rename(home / "gone")
    try:
        assert [line.partition(" ")[0] for line in servers.status() if ": running" in line] == [f"{n}:" for n in NAMES]
    finally:
        folder.rename(home / DATA / "servers")


@pytest.mark.parametrize("named", [None, "http://127.0.0.1:{}/api", "http://localhost:{}/api/", "http://elsewhere/api"])
def test_commands_find_the_server_and_its_login(
    ports: dict[str, int], home: Path, monkeypatch: pytest.MonkeyPatch, named: str | None
) -> None:
    shell = {key: value for key, value in os.environ.items() if not key.startswith("PREFECT_API")}
    shell |= {"PREFECT_API_URL": named.format(ports["prefect"])} if named else {}
    monkeypatch.setattr(os, "environ", shell)
    assert servers.find_prefect()
    ours = named is None or "elsewhere" not in named
    assert shell.get("PREFECT_API_AUTH_STRING") == (":".join(login(home)) if ours else None), "a login given away"
    assert "127.0.0.1" in shell["NO_PROXY"]


def test_deployments_changed_on_prefects_page_stay_so(ports: dict[str, int], home: Path) -> None:
    deployment = get(ports, "/deployments/name/d3po/round")
    (nightly,) = deployment["schedules"]
    assert (nightly["schedule"]["cron"], nightly["active"]) == ("0 2 * * *", True)  # by `up --nightly`, above
    path = f"/deployments/{deployment['id']}"
    changed = {"active": False, "schedule": {"cron": "30 4 * * 1", "timezone": "Europe/Berlin"}}
    call(ports, "PATCH", f"{path}/schedules/{nightly['id']}", changed)
    call(ports, "PATCH", path, {"parameters": {"rounds": 3}, "concurrency_limit": 2})
    deployed = home / DATA / "servers" / "deployed.json"
    deployed.write_text(json.dumps(json.loads(deployed.read_text()) | {"digest": "of an earlier version"}))
    lines = servers.up(*ports.values())
    assert "round: schedules, parameters, concurrency_limit stay as on Prefect's page" in lines
    after = get(ports, "/deployments/name/d3po/round")
    (schedule,) = after["schedules"]
    assert (schedule["schedule"]["cron"], schedule["schedule"]["timezone"]) == ("30 4 * * 1", "Europe/Berlin")
    assert (schedule["active"], schedule["slug"], after["parameters"]) == (False, "nightly", {"rounds": 3})
    assert after["global_concurrency_limit"]["limit"] == 2
    assert get(ports, "/deployments/name/d3po/published")["parameters"] == deployment_parameters("published")


def skipped_by(run_id: str, ports: dict[str, int], home: Path) -> list[str]:
    """The names of the nights that the flow skips when it runs as this one."""
    url = f"http://127.0.0.1:{ports['prefect']}/api"
    here = {PREFECT_API_URL: url, PREFECT_API_AUTH_STRING: ":".join(login(home))}
    with temporary_settings(here), pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT__RUNTIME__FLOW_RUN__ID", run_id)
        patch.setenv("NO_PROXY", "127.0.0.1")  # as the servers set it for the runs
        return skip_missed_nights()


def test_one_missed_night_stands_for_all(ports: dict[str, int], home: Path) -> None:
    worker = leader("worker")
    assert worker
    worker.kill()
    url = f"/deployments/{get(ports, '/deployments/name/d3po/published')['id']}"
    asked_for = post(ports, f"{url}/create_flow_run", {})["id"]
    second = {"interval": 1, "anchor_date": "2026-01-01T00:00:00Z"}
    (schedule,) = post(ports, f"{url}/schedules", [{"schedule": second, "active": True}])
    late = {
        "flow_runs": {"state": {"name": {"any_": ["Late", "Scheduled"]}}},
        "deployments": {"name": {"any_": ["published"]}},
    }

    def missed() -> list[dict[str, Any]]:
        now = datetime.now(UTC).isoformat()
        due = {"expected_start_time": {"before_": now}}
        runs = post(ports, "/flow_runs/filter", {**late, "flow_runs": late["flow_runs"] | due})
        return [run for run in runs if run["auto_scheduled"]]

    assert eventually(lambda: len(missed()) >= 3)
    assert skipped_by(asked_for, ports, home) == [], "a run that somebody asked for does not stand for a night"
    before = sorted(missed(), key=lambda run: run["expected_start_time"])
    first, *others = before
    names = skipped_by(first["id"], ports, home)
    assert {run["name"] for run in others} <= set(names)
    states = {run["id"]: get(ports, f"/flow_runs/{run['id']}")["state"] for run in before}
    assert [state["type"] for state in states.values()] == ["SCHEDULED", *["CANCELLED"] * len(others)]
    assert states[others[0]["id"]]["message"] == f"Missed; the scheduled run {first['name']} does its work too."
    assert get(ports, f"/flow_runs/{asked_for}")["state_type"] == "SCHEDULED"
    call(ports, "DELETE", f"{url}/schedules/{schedule['id']}")  # those to come, and the one that is left, go with it
    call(ports, "DELETE", f"/flow_runs/{asked_for}")
    assert missed() == []


def test_killed_worker_is_started_again_and_lost_runs_crash(ports: dict[str, int], home: Path) -> None:
    servers.up(*ports.values())
    before = pids()
    os.kill(before["worker"], signal.SIGKILL)
    assert eventually(lambda: any(line.startswith("worker: not running") for line in servers.status()))
    lost, living = make_running(ports), make_running(ports)
    marks = {
        "PREFECT__FLOW_RUN_ID": living,
        "PREFECT_API_URL": f"http://127.0.0.1:{ports['prefect']}/api",
        "D3PO_DATA": str(home / DATA),
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
    after = pids()
    assert after["worker"] != before["worker"]
    assert {**after, "worker": 0} == {**before, "worker": 0}


def test_killed_server_is_started_again_on_its_port(ports: dict[str, int], home: Path) -> None:
    before = pids()
    children = psutil.Process(before["mlflow"]).children(recursive=True)
    assert children, "the server was expected to have children that outlive it"
    os.kill(before["mlflow"], signal.SIGKILL)
    assert eventually(lambda: any(line.startswith("mlflow: not running") for line in servers.status()))
    assert "started: mlflow" in servers.up(*ports.values())
    assert httpx.get(f"http://127.0.0.1:{ports['mlflow']}/health", timeout=30, trust_env=False).is_success
    assert [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE] == []
    assert {**pids(), "mlflow": 0} == {**before, "mlflow": 0}


def test_down_ends_every_process_also_when_prefect_hangs_and_restores_the_profile(
    ports: dict[str, int], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "PATIENCE", 0.5)
    roots = [psutil.Process(pid) for pid in pids().values()]
    all_of_them = [*roots, *(child for root in roots for child in root.children(recursive=True))]
    psutil.Process(pids()["prefect"]).suspend()
    os.kill(pids()["mlflow"], signal.SIGKILL)  # its child lives on, and holds the port
    assert len(roots) == 4
    lines = servers.down()
    assert any(line.startswith("runs that were cut off are marked by the next `d3po up` (") for line in lines)
    assert [line.partition(":")[0] for line in lines if "ended" in line] == ["worker", "label", "mlflow", "prefect"]
    assert [
        process for process in all_of_them if process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    ] == []
    assert active_profile(home) == "mine"
    assert servers.down() == ["nothing to end: no servers are running"]
    assert active_profile(home) == "mine"
    assert read_state() == {"ports": ports}, "the next `up` uses the same ports"


def test_down_leaves_a_process_alone_that_got_a_recorded_pid(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("D3PO_DATA", str(home / "other"))
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as stranger:
        try:
            (home / "other" / "servers").mkdir(parents=True)
            # Even one that was started at that time: it does not carry our mark.
            record = {"pid": stranger.pid, "created": psutil.Process(stranger.pid).create_time()}
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
            servers.up(*((port, free) if taken == "prefect" else (free, port)), free_ports(1)[0])
    assert str(port) in str(caught.value)
    assert f"--{taken}-port" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert f"pid {os.getpid()}: " in str(caught.value), "whose it is"
    assert psutil.Process().cmdline()[0] in str(caught.value), "what it is"
    assert {path.name for path in (home / "unused").rglob("*")} == {"servers", ".lock"}


def test_data_folder_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("D3PO_DATA", str(tmp_path / "file"))
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with pytest.raises(D3POError, match=r"cannot write .*; make its folder writable, or set D3PO_DATA"):
        servers.up(*free_ports(3))
    assert servers.down() == ["nothing to end: no servers are running"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PREFECT_API_URL", "http://example.invalid/api"), ("PREFECT_PROFILE", "cloud"),
        ("PREFECT_API_AUTH_STRING", "ann:secret"),
    ],
)  # fmt: skip
def test_shell_set_to_another_server_is_refused(
    home: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv("D3PO_DATA", str(home / "untouched"))
    monkeypatch.setenv(name, value)
    with pytest.raises(D3POError, match=f"{name} is set.*unset {name}") as caught:
        servers.up(*free_ports(3))
    assert (value in str(caught.value)) == ("AUTH" not in name), "a login is not shown"
    assert not (home / "untouched").exists()


def test_presets_are_valid_and_published_is_the_published_code() -> None:
    presets = {
        entry["name"]: entry for entry in yaml.safe_load((PROJECT_ROOT / "prefect.yaml").read_text())["deployments"]
    }
    assert [(one["cron"], one["active"]) for one in presets["round"]["schedules"]] == [("0 2 * * *", False)]
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
