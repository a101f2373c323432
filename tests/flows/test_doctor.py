"""``d3po doctor``: ports and servers, one line for each check, and the exit code."""

import os
import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner

from d3po.flows import doctor
from d3po.flows.commands.line import app
from d3po.flows.doctor import check_server, check_shell, check_worker
from d3po_core.machine.health import Check
from tests.flows.real_servers import free_ports

NO_COLOUR = {"NO_COLOR": "1"}


@pytest.fixture(autouse=True)
def no_servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("D3PO_DATA", str(tmp_path))
    for name in [name for name in os.environ if name.startswith("PREFECT_")]:
        monkeypatch.delenv(name)


def test_a_port_that_another_program_holds_names_it_and_the_way_out() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        port = held.getsockname()[1]
        check = check_server("mlflow", {"mlflow": port})
    assert check.state == "warn"
    assert f"port {port} for mlflow cannot be used" in check.found
    assert f"pid {os.getpid()}" in check.found
    assert check.remedy == "for another port, type `d3po up --mlflow-port <a free port>`"
    assert check_server("mlflow", {"mlflow": port}).state == "ok"


@pytest.mark.parametrize(("answers", "state"), [(True, "ok"), (False, "fail")])
def test_a_server_that_runs_must_answer(answers: bool, state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(doctor, "leader", lambda name: object())
    monkeypatch.setattr(doctor, "answers", lambda url: asked.append(url) or answers)
    assert [check_server(name, {name: 21100}).state for name in ("prefect", "label")] == [state, state]
    assert asked == ["http://127.0.0.1:21100/api/health", "http://127.0.0.1:21100/health"]


def test_prefect_without_a_worker_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_worker().state == "ok"
    monkeypatch.setattr(doctor, "leader", lambda name: object() if name == "prefect" else None)
    assert check_worker().state == "fail"
    (port,) = free_ports(1)
    assert check_server("label", {"label": port}).state == "warn"


def test_a_shell_that_points_elsewhere_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    ports = {"prefect": 4200}
    assert check_shell(ports).state == "ok"
    monkeypatch.setenv("PREFECT_API_URL", "http://elsewhere/api")
    assert check_shell(ports).remedy.startswith("type `unset PREFECT_API_URL`")


@pytest.mark.parametrize(("state", "code"), [("ok", 0), ("warn", 0), ("fail", 1)])
def test_the_exit_code_is_1_if_a_check_fails(state: str, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: iter([Check("a", state, "found", "do this"), Check("b", "ok", "")]))
    done = CliRunner().invoke(app, ["doctor"], env=NO_COLOUR)
    assert done.exit_code == code
    assert done.output.splitlines()[0] == f"{state:4}  a: found; do this"


def test_every_check_is_made_on_this_machine() -> None:
    done = CliRunner().invoke(app, ["doctor"], env=NO_COLOUR)
    names = [line[6:].partition(":")[0] for line in done.output.splitlines()]
    assert names == [
        "Python", "torch", "GPU memory", "disk", "model cache", "libraries", "pins", "prefect", "mlflow", "label",
        "worker", "shell",
    ]  # fmt: skip
    assert {line[:4].strip() for line in done.output.splitlines()} <= {"ok", "warn", "fail"}


@pytest.mark.parametrize("name", ["D3PO_DATA", "D3PO_PROJECT"])
def test_a_data_folder_that_cannot_be_is_a_failed_check(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("D3PO_DATA")
    monkeypatch.setenv(name, "~nobody-of-this-name/data")
    done = CliRunner().invoke(app, ["doctor"], env=NO_COLOUR)
    assert done.exit_code == 1, done.exception
    assert f"fail  disk: {name}" in done.stdout
    assert "libraries" in done.stdout
