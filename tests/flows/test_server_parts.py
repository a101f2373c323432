"""What `up` and `down` are made of, without servers of their own."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.request import proxy_bypass_environment

import httpx
import psutil
import pytest
from prefect.settings.models.server.logs import ServerLogsSettings

from d3po.flows import prefect_api, server_processes, servers
from d3po.flows.commands import line as command_line
from d3po.flows.loopback import is_proxied, without_proxy
from d3po.flows.prefect_profile import active_profile, shown_profile
from d3po.flows.server_checks import require_ports
from d3po.flows.server_files import login, make_folder, make_login, read_state, server_file, write_state
from d3po.flows.server_programs import NAMES, server_environment
from d3po_core.errors import D3POError
from tests.flows.real_servers import free_ports


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith("PREFECT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("D3PO_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path / "data"


DAMAGE = [
    "", "[]", "null", "{", '{"ports":{}}', '{"ports":{"prefect":"4200"}}', '{"ports":{"prefect":true,"mlflow":70000}}',
    '{"processes":{"worker":{"pid":-1,"created":0}}}', '{"processes":{"worker":{"pid":0}}}', '{"processes":[1]}',
    '{"processes":{"worker":5},"ports":7,"profile":{}}', "[" * 100_000, "\ud800",
]  # fmt: skip


@pytest.mark.parametrize(
    "text", [*DAMAGE, None], ids=[*(text[:40].encode("ascii", "replace").decode() for text in DAMAGE), "folder"]
)
def test_damaged_servers_json_stops_no_command(data: Path, text: str | None) -> None:
    make_folder()
    file = server_file("servers.json")
    file.mkdir() if text is None else file.write_bytes(text.encode(errors="surrogatepass"))
    assert read_state().get("ports", {}) == read_state().get("processes", {}) == {}
    assert [line.partition(",")[0] for line in servers.status()[:2]] == ["prefect: not running", "mlflow: not running"]
    assert servers.prefect_url() is None
    assert servers.down() == ["nothing to end: no servers are running"]
    if text is None:
        with pytest.raises(D3POError, match=r"servers\.json is a folder, where `d3po up` keeps a file; move it away"):
            write_state({})
    else:
        assert not file.exists()


def test_servers_folder_of_an_earlier_version_becomes_private(data: Path) -> None:
    (data / "servers").mkdir(parents=True, mode=0o755)
    log = data / "servers" / "label.log"
    log.write_text("ann: http://127.0.0.1:8700/enter?key=secret\n")
    log.chmod(0o644)
    make_folder()
    assert (data / "servers").stat().st_mode & 0o777 == 0o700
    assert log.stat().st_mode & 0o777 == 0o600


def test_login_is_made_once_and_the_shells_own_is_taken(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert login() is None
    make_folder()
    first = make_login()
    assert first == login() == make_login()
    assert len(first.partition(":")[2]) >= 32
    assert server_file("prefect-login").stat().st_mode & 0o777 == 0o600
    monkeypatch.setenv("PREFECT_SERVER_API_AUTH_STRING", "ann:own")
    assert make_login() == login() == "ann:own"


@pytest.mark.parametrize(
    ("ports", "said"),
    [
        ((4200, 4200, 8700), r"port 4200 is given for both prefect and mlflow; .* type `d3po up --mlflow-port"),
        ((4200, 5000, 5000), r"port 5000 is given for both mlflow and label"),
        ((7, 7, 7), r"port 7 is given for both"),
        ((0, 5000, 8700), r"port 0 for prefect: expected 1 to 65535"),
        ((4200, 65536, 8700), r"port 65536 for mlflow: expected 1 to 65535"),
    ],
)
def test_ports_that_cannot_be_are_refused_before_anything_starts(
    data: Path, ports: tuple[int, int, int], said: str
) -> None:
    with pytest.raises(D3POError, match=said):
        servers.up(*ports)
    assert not data.exists()
    require_ports({"prefect": 1, "mlflow": 2, "label": 65535})


@pytest.fixture
def answering() -> Iterator[tuple[dict[str, int], dict[str, object]]]:
    """A server in place of Prefect's, that answers as it is told."""
    told: dict[str, object] = {"status": 200, "body": b"{}", "wait": 0.0, "busy": 0}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            told["authorization"] = self.headers.get("Authorization")
            time.sleep(float(str(told["wait"])))
            status = 503 if told["busy"] else told["status"]
            told["busy"] = max(0, int(str(told["busy"])) - 1)
            self.send_response(int(str(status)))
            self.end_headers()
            with contextlib.suppress(BrokenPipeError):
                self.wfile.write(told["body"])  # type: ignore[arg-type]

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=partial(server.serve_forever, 0.02), daemon=True).start()
    yield {"prefect": server.server_address[1], "mlflow": 1, "label": 2}, told
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"status": 401}, r"refuses the login in .*prefect-login; .* type `d3po down`, then `d3po up`"),
        (
            {"status": 500, "body": b"<html>\nbroken\n</html>"},
            r"answers .* with 500 \(<html> broken </html>\); see",
        ),
        ({"body": b"<html>"}, r"does not answer .*; see .*prefect\.log"),
        ({"wait": 1.0}, r"does not answer .*\(timed out\)"),
        ({"busy": 99}, r"answers .* with 503"),
    ],
)
def test_every_failing_answer_of_prefect_is_one_line(
    answering: tuple[dict[str, int], dict[str, object]], changes: dict[str, object], said: str
) -> None:
    ports, told = answering
    told.update(changes)
    with pytest.raises(D3POError, match=said) as caught:
        prefect_api.ask(ports, "GET", "/admin/version", seconds=0.3)
    assert "\n" not in str(caught.value)


def test_prefect_is_asked_with_the_login_past_the_proxy_and_again_when_busy(
    answering: tuple[dict[str, int], dict[str, object]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ports, told = answering
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("PREFECT_SERVER_API_AUTH_STRING", "d3po:secret")
    monkeypatch.setattr(prefect_api.time, "sleep", lambda _: None)
    make_folder()
    make_login()
    told.update(busy=1, body=b'{"a": 1}')
    assert prefect_api.ask(ports, "GET", "/x") == {"a": 1}
    assert told["authorization"] == httpx.BasicAuth("d3po", "secret")._auth_header
    told.update(status=404)
    assert prefect_api.ask(ports, "GET", "/x") is None


@pytest.mark.parametrize("kept", ["", "example.org", "example.org, localhost", "*"])
def test_loopback_is_excluded_from_proxies_and_the_rest_is_as_it_was(kept: str) -> None:
    found = without_proxy({"NO_PROXY": kept})
    assert found["NO_PROXY"] == found["no_proxy"]
    for host in ("127.0.0.1", "localhost", "127.0.0.1:4200", *(["example.org"] if kept else [])):
        assert proxy_bypass_environment(host, {"no": found["no_proxy"]})
    assert bool(proxy_bypass_environment("elsewhere.net", {"no": found["no_proxy"]})) == (kept == "*")
    assert not is_proxied({"NO_PROXY": kept})
    assert is_proxied({"NO_PROXY": kept, "HTTP_PROXY": "http://p"}) == (kept != "*")
    assert not is_proxied({**found, "http_proxy": "http://p"})


def test_profiles_that_cannot_be_read_are_one_line(tmp_path: Path) -> None:
    assert active_profile() == "ephemeral"
    (tmp_path / ".prefect").mkdir()
    (tmp_path / ".prefect" / "profiles.toml").write_text("active = [")
    with pytest.raises(D3POError, match=r"Prefect's profiles in .*profiles\.toml cannot be read"):
        active_profile()
    assert shown_profile().startswith("not known: ")
    assert servers.down() == ["nothing to end: no servers are running"]


def test_what_is_remembered_is_read_back(data: Path) -> None:
    make_folder()
    state = {"ports": {"prefect": 1, "mlflow": 2, "label": 3}, "profile": "mine"}
    write_state(state)
    assert read_state() == state
    assert json.loads(server_file("servers.json").read_text()) == state
    assert server_file("servers.json").stat().st_mode & 0o777 == 0o600


def test_ports_are_those_of_the_last_time(data: Path) -> None:
    first, second = free_ports(2)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        make_folder()
        write_state({"ports": {"prefect": first, "mlflow": taken, "label": second}, "profile": "mine"})
        servers.down()
        with pytest.raises(D3POError, match=f"port {taken} for mlflow cannot be used .*--mlflow-port <a free port>"):
            servers.up()
        with pytest.raises(D3POError, match=f"port {taken} for prefect cannot be used"):
            servers.up(prefect_port=taken, mlflow_port=first)


def test_servers_of_a_removed_folder_are_named_with_what_ends_them(
    data: Path, sleepers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_ports(1)[0]
    listens = f"import socket, time; s = socket.create_server(('127.0.0.1', {port})); time.sleep(600)"
    monkeypatch.setattr(server_processes, "server_command", lambda *_: [sys.executable, "-c", listens])
    make_folder()
    server_processes.start("mlflow", {"prefect": 1, "mlflow": port, "label": 3}, "d3po:secret")
    deadline = time.monotonic() + 20
    while not server_processes.who_listens(port) and time.monotonic() < deadline:
        time.sleep(0.02)
    (pid,) = [process.pid for process in server_processes.family("mlflow")]
    ends = f"D3PO_DATA={data} d3po down"
    assert server_processes.who_listens(port) == f"the mlflow of data folder {data}, pid {pid}; to end it: {ends}"
    data.rename(data.with_name("gone"))
    (line,) = [line for line in server_processes.lost_servers() if str(data) in line]
    assert line == f"data folder {data} is gone, but its servers run: mlflow (pid {pid}); to end them: {ends}"
    assert f"data folder {data}, which is gone, pid {pid}" in server_processes.who_listens(port)
    assert servers.down() == [f"mlflow: ended (pid {pid})"]
    assert not data.exists()


def test_up_does_not_go_on_with_servers_whose_folder_is_gone(data: Path, sleepers: None) -> None:
    make_folder()
    server_processes.start("prefect", dict(zip(("prefect", "mlflow", "label"), free_ports(3), strict=True)), "d3po:x")
    with pytest.raises(D3POError, match=r"prefect-login is gone: .* type `d3po down`, then `d3po up`"):
        servers.up()


SLEEPS = [sys.executable, "-c", "import time; time.sleep(600)"]


@pytest.fixture
def sleepers(data: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Servers that only sleep, in place of the real ones; whatever a test leaves behind is ended."""
    monkeypatch.setattr(server_processes, "server_command", lambda *_: SLEEPS)
    monkeypatch.setattr(servers, "_make_stores", lambda _: None)
    yield
    for name in NAMES:
        server_processes.end(server_processes.family(name))


@pytest.mark.parametrize("how", ["does not answer", "ends at once", "is ended by Ctrl-C"])
def test_up_that_fails_leaves_nothing_that_it_started(
    sleepers: None, data: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    error, said = D3POError, r"prefect did not answer within 0 s; see .*prefect\.log"
    monkeypatch.setattr(server_processes, "START_SECONDS", 0.2)
    if how == "ends at once":
        monkeypatch.setattr(server_processes, "server_command", lambda *_: [sys.executable, "-c", ""])
        said = r"prefect ended while it started; .*prefect\.log says why"
        monkeypatch.setattr(server_processes, "START_SECONDS", 20)
    elif how == "is ended by Ctrl-C":
        monkeypatch.setattr(servers, "answers", interrupted)
        error, said = KeyboardInterrupt, "^$"
    with pytest.raises(error, match=said):
        servers.up(*free_ports(3))
    assert [server_processes.family(name) for name in NAMES] == [[], [], [], []]


def interrupted(_: str) -> bool:
    assert [name for name in NAMES if server_processes.leader(name)] == ["prefect", "mlflow", "label"]
    raise KeyboardInterrupt


def test_children_of_a_server_that_was_killed_are_its_own(sleepers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = f"import subprocess, sys; subprocess.run({SLEEPS})"
    monkeypatch.setattr(server_processes, "server_command", lambda *_: [sys.executable, "-c", parent])
    make_folder()
    server_processes.start("mlflow", {"prefect": 1, "mlflow": 2, "label": 3}, "d3po:secret")
    deadline = time.monotonic() + 20
    while len(server_processes.family("mlflow")) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    server, child = server_processes.family("mlflow")
    assert server_processes.leader("mlflow") == server
    server.kill()
    server.wait()
    assert server_processes.leader("mlflow") is None
    assert server_processes.family("mlflow") == [child]
    assert servers.down() == [f"mlflow: ended (pid {child.pid})"]
    assert not child.is_running()


@pytest.mark.parametrize("whose", ["an earlier version's server", "somebody else's, with its pid"])
def test_servers_of_an_earlier_version_are_ended_and_strangers_are_not(data: Path, whose: str) -> None:
    ours = whose.startswith("an earlier")
    marks = {"D3PO_DATA": str(data)} | ({"D3PO_MLFLOW_URL": "http://127.0.0.1:5000"} if ours else {})
    with subprocess.Popen(SLEEPS, env=os.environ | marks, start_new_session=True) as process:
        try:
            created = psutil.Process(process.pid).create_time()
            state = {"ports": {"prefect": 1}, "processes": {"mlflow": {"pid": process.pid, "created": created}}}
            make_folder()
            server_file("servers.json").write_text(json.dumps(state))
            said = f"mlflow: ended (pid {process.pid})" if ours else "nothing to end: no servers are running"
            assert servers.down() == [said]
            assert psutil.pid_exists(process.pid) != ours
        finally:
            process.kill()


@pytest.mark.parametrize("code", [401, 403, 500])
def test_prefect_server_that_refuses_ends_a_command_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: int
) -> None:
    request = httpx.Request("POST", "http://ann:secret@127.0.0.1:4200/api/flows/?key=secret")

    def refused() -> None:
        raise httpx.HTTPStatusError("long\nstory", request=request, response=httpx.Response(code, request=request))

    ended: list[int] = []
    monkeypatch.setattr(command_line, "app", refused)
    monkeypatch.setattr(command_line, "_leave", ended.append)
    monkeypatch.setenv("NO_PROXY", "")
    monkeypatch.setenv("no_proxy", "")
    command_line.main()
    said = capsys.readouterr().err
    assert ended == [2]
    assert said.startswith(f"d3po: the Prefect server answers http://127.0.0.1:4200/api/flows/ with {code}")
    assert ("in PREFECT_API_AUTH_STRING" in said) == (code != 500)
    assert said.count("\n") == 1
    assert "secret" not in said


def test_worker_ends_before_a_run_that_outlived_the_worker_before(sleepers: None, data: Path) -> None:
    make_folder()
    ports = {"prefect": 1, "mlflow": 2, "label": 3}
    run = server_environment("worker", ports, "") | {server_processes.FLOW_RUN: "some run"}
    with subprocess.Popen(SLEEPS, env=run, start_new_session=True) as process:
        server_processes.start("worker", ports, "d3po:secret")
        worker, living = server_processes.family("worker")
        assert (server_processes.leader("worker"), living.pid) == (worker, process.pid)
        assert server_processes.living_flow_runs(ports) == {"some run"}
        assert servers.down() == [f"worker: ended (pid {worker.pid})"]
        assert not psutil.pid_exists(process.pid)


def test_prefects_server_streams_logs_else_watch_shows_no_score(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = ServerLogsSettings()
    for name, value in server_environment("prefect", {"prefect": 1, "mlflow": 2, "label": 3}, "d3po:secret").items():
        monkeypatch.setenv(name, value)
    streamed = ServerLogsSettings()
    assert not before.stream_out_enabled
    assert streamed.stream_out_enabled
    assert streamed.stream_publishing_enabled
