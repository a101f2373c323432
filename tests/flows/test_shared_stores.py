"""Prefect and MLflow on a real PostgreSQL server, artefacts in a bucket of a real S3 server; all on loopback."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import boto3
import httpx
import psutil
import pytest
from moto.server import ThreadedMotoServer

from d3po.flows import server_database, servers
from d3po.flows.doctor import check_stores
from d3po.flows.server_files import server_file
from d3po.flows.server_moving import require_nothing_left
from d3po.flows.server_processes import family
from d3po.flows.server_programs import NAMES, POOL, client_environment, server_command, server_environment
from d3po.flows.server_stores import chosen_stores, read_stores, store_url, write_stores
from d3po.flows.using_stores import use_stores
from d3po_core.errors import D3POError
from d3po_core.store.stages import finished_rounds
from tests.flows.postgres import MISSING, PASSWORD, PROGRAMS, postgres
from tests.flows.real_servers import eventually, free_ports, get, post

pytestmark = [pytest.mark.timeout(400), pytest.mark.skipif(not PROGRAMS, reason=MISSING)]
PORTS = {"prefect": 1, "mlflow": 2, "label": 3}


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with postgres() as port:
        yield port


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """Address of an S3 server with a bucket `team`."""
    (port,) = free_ports(1)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port)
    server.start()
    url = f"http://127.0.0.1:{port}"
    keys = {"aws_access_key_id": "k", "aws_secret_access_key": "s", "region_name": "us-east-1"}
    boto3.client("s3", endpoint_url=url, **keys).create_bucket(Bucket="team")
    yield url
    server.stop()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bucket: str) -> Path:
    for name in [name for name in os.environ if name.startswith(("PREFECT_", "MLFLOW_", "PG", "AWS_"))]:
        monkeypatch.delenv(name)
    settings = {
        "HOME": str(tmp_path), "D3PO_DATA": str(tmp_path / "da?ta #1 50%"), "AWS_ENDPOINT_URL_S3": bucket,
        "AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    server_file("").mkdir(parents=True, mode=0o700)
    return tmp_path


def sql(port: int, *lines: str, database: str = "postgres") -> str:
    """What an administrator's psql prints."""
    words = [
        "psql",
        "-h",
        "127.0.0.1",
        "-p",
        str(port),
        "-U",
        "postgres",
        "-d",
        database,
        "-Atq",
        "-v",
        "ON_ERROR_STOP=1",
    ]
    commands = [word for line in lines for word in ("-c", line)]
    env = os.environ | {"PGPASSWORD": PASSWORD}
    return subprocess.run([*words, *commands], env=env, check=True, capture_output=True, text=True).stdout.strip()


def address(port: int, prefix: str = "", user: str = "postgres") -> str:
    return f"postgresql://{user}@127.0.0.1:{port}/{prefix}"


def test_night_of_rounds_survives_killed_servers_and_a_restart(
    port: int, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ports = dict(zip(("prefect", "mlflow", "label"), free_ports(3), strict=True))
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    try:
        lines = servers.up(*ports.values(), ["round"], address(port, "night"), "s3://team/files")
        assert (
            f"databases night_prefect and night_mlflow on postgres@127.0.0.1:{port}, artefacts in s3://team/files"
            in lines
        )
        monkeypatch.delenv("PGPASSWORD")  # the next shell does not have it
        night = get(ports, "/deployments/name/d3po/round")
        assert night["schedules"][0]["active"]
        config = {
            "campaign": "night", "sample": {"groups_per_round": 2, "num_steps": 3}, "train": {"updates_per_round": 1},
            "evaluate": {"images_per_prompt": 1, "max_prompts": 3},
        }  # fmt: skip
        first = run(ports, night["id"], config)
        before = scores(ports)
        for process in [*family("prefect"), *family("mlflow")]:
            process.kill()
        psutil.wait_procs([*family("prefect"), *family("mlflow")], 10)
        servers.down()
        ended = datetime.now(UTC).isoformat()
        assert "everything is already running" not in servers.up()
        assert get(ports, f"/flow_runs/{first}")["state_type"] == "COMPLETED"
        assert scores(ports) == before != {}
        assert get(ports, "/deployments/name/d3po/round")["schedules"][0]["active"], "still every night"
        workers = lambda: post(ports, f"/work_pools/{POOL}/workers/filter", {})  # noqa: E731
        assert eventually(lambda: max(worker["last_heartbeat_time"] for worker in workers()) > ended)
        campaign = Path(os.environ["D3PO_DATA"]) / "runs" / "night"
        assert [record.round for record in finished_rounds(campaign)] == [0, 1]
        child = finished_rounds(campaign)[1].mlflow_run_id
        assert servers_write(ports, child) == before | {"round 1": 0.25}
        grid = httpx.get(
            f"http://127.0.0.1:{ports['mlflow']}/get-artifact", params={"path": "grid.png", "run_uuid": child},
            timeout=30, trust_env=False,
        )  # fmt: skip
        assert grid.content == (campaign / "images" / "round=1" / "grid.png").read_bytes()
        assert [check.state for check in check_stores()] == ["ok", "ok"]
        assert not list(Path(os.environ["D3PO_DATA"]).glob("*/*.db")), "nothing beside the databases"
        stored = boto3.client("s3").list_objects_v2(Bucket="team", Prefix="files/")["Contents"]
        for name in ("grid.png", "note.txt"):
            assert any(entry["Key"].endswith(f"{child}/artifacts/{name}") for entry in stored)
        told = [text for file in server_file("").glob("*.log") for text in file.read_text().splitlines()] + lines
        assert not [line for line in told if PASSWORD in line]
        assert {file.stat().st_mode & 0o077 for file in server_file("").iterdir()} == {0}
    finally:
        servers.down()


def run(ports: dict[str, int], deployment: str, config: object) -> str:
    """Run one round of a deployment as its schedule does, and return the run's id."""
    body = {"parameters": {"rounds": 1, "config": config}}
    run_id = str(post(ports, f"/deployments/{deployment}/create_flow_run", body)["id"])
    ended = eventually(
        lambda: get(ports, f"/flow_runs/{run_id}")["state_type"] in ("COMPLETED", "FAILED", "CRASHED"), 200
    )
    assert ended
    assert get(ports, f"/flow_runs/{run_id}")["state_type"] == "COMPLETED"
    return run_id


def servers_write(ports: dict[str, int], child: str | None) -> dict[str, float]:
    """Write to both databases and the bucket through their servers, as rounds do; the scores afterwards."""
    post(ports, "/variables/", {"name": "night", "value": "over"})
    assert get(ports, "/variables/name/night")["value"] == "over"
    url = f"http://127.0.0.1:{ports['mlflow']}/api/2.0"
    ask = partial(httpx.request, timeout=30, trust_env=False)
    metric = {"run_id": child, "key": "held_out/prompt_alignment", "value": 0.25, "step": 9, "timestamp": 1}
    ask("POST", f"{url}/mlflow/runs/log-metric", json=metric).raise_for_status()
    found = ask("GET", f"{url}/mlflow/runs/get?run_id={child}").raise_for_status().json()["run"]["info"]
    path = found["artifact_uri"].removeprefix("mlflow-artifacts:/")
    ask("PUT", f"{url}/mlflow-artifacts/artifacts/{path}/note.txt", content=b"kept").raise_for_status()
    return scores(ports)


def scores(ports: dict[str, int]) -> dict[str, float]:
    """Held-out score of every round that MLflow's server knows, asked over HTTP."""
    url = f"http://127.0.0.1:{ports['mlflow']}/api/2.0/mlflow"
    found = httpx.get(f"{url}/experiments/get-by-name?experiment_name=d3po", timeout=30, trust_env=False).json()
    body = {"experiment_ids": [found["experiment"]["experiment_id"]]}
    runs = httpx.post(f"{url}/runs/search", json=body, timeout=30, trust_env=False).json()["runs"]
    names = {run["info"]["run_id"]: run["info"]["run_name"].partition(":")[0] for run in runs}
    return {
        names[run["info"]["run_id"]]: metric["value"]
        for run in runs for metric in run["data"].get("metrics", [])
        if metric["key"] == "held_out/prompt_alignment" and names[run["info"]["run_id"]].startswith(("round", "base"))
    }  # fmt: skip


def test_only_the_two_servers_get_the_password_and_no_command_line(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    monkeypatch.setenv("D3PO_DATABASE", f"postgresql://ann:secret@127.0.0.1:{port}/")
    write_stores(chosen_stores(address(port, "one"), "s3://team/files"))
    assert server_file("stores.json").stat().st_mode & 0o777 == 0o600
    for name in NAMES:
        environment, command = server_environment(name, PORTS, "d3po:login"), server_command(name, PORTS)
        assert not [word for word in command if PASSWORD in word]
        assert (environment.get("PGPASSWORD") == PASSWORD) == (name in ("prefect", "mlflow")), name
        assert "secret" not in str(environment)
    assert client_environment(PORTS, "")["MLFLOW_TRACKING_URI"] == "http://127.0.0.1:2"


def test_address_is_remembered_without_its_password_and_with_its_options(port: int) -> None:
    write_stores(chosen_stores("postgresql://ann:s%40crt@db.example/team?sslmode=require", None))
    stores = read_stores()
    assert (stores["database"], stores["password"]) == (
        "postgresql://ann@db.example:5432/team?sslmode=require", "s@crt",
    )  # fmt: skip
    assert "crt" not in stores["database"]
    assert store_url(stores, "prefect") == "postgresql+asyncpg://ann@db.example:5432/team_prefect"
    assert store_url(stores, "mlflow") == "postgresql+psycopg2://ann@db.example:5432/team_mlflow"
    assert server_environment("prefect", PORTS, "")["PGSSLMODE"] == "require"
    assert chosen_stores("postgresql://ann@db.example/team?sslmode=require", None)["password"] == "s@crt"
    assert chosen_stores("local", None) == {}


@pytest.mark.parametrize(
    ("database", "artifacts", "said"),
    [
        ("mysql://a/", None, "begins with mysql://; expected postgresql://"), ("nonsense", None, "is no address"),
        ("postgresql:///x", None, "names no host"), ("postgresql://a/b?options=-c", None, "says options; after"),
        ("postgresql://ann:secret@a/B-1", None, "small letters"), (None, "s3://team/x", "needs a database"),
        ("postgresql://a/", "gs://team/x", r"expected s3://bucket/prefix"), ("postgresql://a/", "s3://", "expected s3"),
    ],
)  # fmt: skip
def test_wrong_address_is_one_line_without_the_password(database: str | None, artifacts: str | None, said: str) -> None:
    with pytest.raises(D3POError, match=said) as caught:
        chosen_stores(database, artifacts)
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_damaged_file_of_stores_never_falls_back_to_the_data_folder() -> None:
    server_file("stores.json").write_text('{"database": ')
    with pytest.raises(D3POError, match=r"stores\.json does not say any more which database .* `d3po up --database"):
        servers.up()
    assert servers.down() == ["nothing to end: no servers are running"]
    assert any("does not say any more" in line for line in servers.status())
    assert chosen_stores("local", None) == {}


def refused(database: str, artifacts: str | None = None) -> str:
    with pytest.raises(D3POError) as caught:
        use_stores(database, artifacts, False, NAMES)
    assert "\n" not in str(caught.value)
    assert not server_file("stores.json").exists(), "what cannot be used is not remembered"
    return str(caught.value)


def test_each_way_postgres_can_refuse_is_one_line(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    (closed,) = free_ports(1)
    assert f"no PostgreSQL answers at postgres@127.0.0.1:{closed}" in refused(address(closed))
    assert "password authentication failed" in refused(f"postgresql://postgres:wrong@127.0.0.1:{port}/")
    sql(port, "CREATE ROLE poor LOGIN PASSWORD 'x'", "CREATE DATABASE lent_prefect")
    poor = f"postgresql://poor:x@127.0.0.1:{port}/"
    assert "may not create it" in (line := refused(f"{poor}gone"))
    assert line.endswith("let its administrator type: CREATE DATABASE gone_prefect OWNER poor;")
    assert "let its administrator type: ALTER DATABASE lent_prefect OWNER TO poor;" in refused(f"{poor}lent")
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    sql(port, "CREATE TABLE invoices (id int)", database="lent_prefect")
    assert "database lent_prefect holds 1 tables that are not prefect's; give a prefix" in refused(
        address(port, "lent")
    )
    sql(port, "CREATE TABLE alembic_version AS SELECT 'f00d' AS version_num", database="lent_prefect")
    assert "has tables of version f00d, which this prefect does not know" in refused(address(port, "lent"))
    monkeypatch.setattr(server_database, "OLDEST", 99)
    assert "Prefect needs 99 or newer: upgrade it" in refused(address(port, "old"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert refused(address(port)).endswith("needs psycopg2 and boto3; type `pip install 'd3po[servers]'`")


def test_each_way_the_bucket_can_refuse_is_one_line(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    assert "there is no bucket nowhere; create it: aws --endpoint-url http" in refused(address(port), "s3://nowhere/x")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    assert "no credentials for the object store; set AWS_ACCESS_KEY_ID" in refused(address(port), "s3://team/x")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{free_ports(1)[0]}")
    assert "s3://team/x: no answer (" in refused(address(port), "s3://team/x")


def test_doctor_says_when_the_remembered_stores_fail(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(check_stores()) == [], "nothing to check without them"
    write_stores({"database": address(free_ports(1)[0])})
    (database,) = check_stores()
    assert (database.state, database.remedy[:10]) == ("fail", "is it star")


def test_moving_leaves_nothing_behind_without_a_word(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    make_runs = (
        "import sqlite3, sys; d = sqlite3.connect(sys.argv[1]); d.execute('CREATE TABLE flow_run (state_type)');"
        "d.executemany('INSERT INTO flow_run VALUES (?)', [('COMPLETED',), ('PAUSED',), ('SCHEDULED',)]); d.commit()"
    )
    folder = Path(os.environ["D3PO_DATA"]) / "prefect"
    folder.mkdir()
    subprocess.run([sys.executable, "-c", make_runs, folder / "prefect.db"], check=True)
    line = refused(address(port, "move"))
    assert "holds 2 runs of Prefect in prefect/prefect.db, which a database would not show" in line
    assert line.endswith("To start anew there all the same, add --anew")
    use_stores(address(port, "move"), None, True, NAMES)
    assert json.loads(server_file("stores.json").read_text())["database"] == address(port, "move")
    require_nothing_left(chosen_stores(address(port, "move"), None))
    for other in (chosen_stores(address(port, "else"), None), {}):
        with pytest.raises(D3POError, match=r"the servers used PostgreSQL at postgres@.* lacks"):
            require_nothing_left(other)
    with pytest.raises(D3POError, match=r"copy them: `aws s3 sync .*/mlflow/artifacts s3://team/x`, then"):
        require_nothing_left(chosen_stores(None, "s3://team/x"))


def test_versions_of_tables_are_those_of_the_installed_programs() -> None:
    from alembic.script import ScriptDirectory
    from mlflow.store.db.utils import _get_alembic_config

    scripts = ScriptDirectory.from_config(_get_alembic_config("postgresql://"))
    assert server_database.known_versions("mlflow") == {script.revision for script in scripts.walk_revisions()}
    assert len(server_database.known_versions("prefect")) > 50
