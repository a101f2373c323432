"""A real S3 server on the loopback, and a mirror in it or in a folder."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def s3_address() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_address: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The address of a mirror in a bucket of the test's own, whose server the environment names."""
    import boto3

    given = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}
    for name, value in {**given, "AWS_ENDPOINT_URL": s3_address, "NO_PROXY": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    bucket = f"bucket-{abs(hash(tmp_path)) % 10**8}"
    boto3.client("s3", endpoint_url=s3_address, region_name="us-east-1").create_bucket(Bucket=bucket)
    return f"s3://{bucket}/prefix"


@pytest.fixture
def folder_mirror(tmp_path: Path) -> str:
    (tmp_path / "m").mkdir()
    return f"file://{tmp_path / 'm'}"


@pytest.fixture(params=["folder_mirror", "s3"])
def mirror(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(request.param))
