"""Google Cloud and Azure: addresses, missing credentials, and a campaign in a server of their protocol.

Google's protocol is a fake of these tests. Azure's is Azurite, if one runs at ``AZURITE_BLOB_STORAGE_URL``:
``npm install azurite && npx azurite-blob --inMemoryPersistence --skipApiVersionCheck``.
"""

import base64
import hashlib
import hmac
import json
import os
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path

import httpx
import pytest

from d3po_core.errors import D3POError
from d3po_core.mirror.lease import LeaseHeldError
from d3po_core.mirror.objects import open_objects
from tests.core.mirror.campaigns import Machine, refuses_to_overwrite
from tests.core.mirror.fake_gcs import FakeGcs

AZURITE = "AZURITE_BLOB_STORAGE_URL"
# Azurite's own account, the same everywhere.
ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


@pytest.fixture
def gs(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    server = FakeGcs()
    key = {"gcs_base_url": server.address, "disable_oauth": True}
    key |= dict.fromkeys(("client_email", "private_key", "private_key_id"), "")
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", json.dumps(key))
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.address)  # plain http is allowed only with an endpoint of one's own
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield "gs://bucket/prefix"
    assert set(server.conditions) == {"0"}, "every put is conditional"
    server.shutdown()
    server.server_close()


@pytest.fixture
def az(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    if AZURITE not in os.environ:
        pytest.skip(f"no Azurite runs at {AZURITE}")
    monkeypatch.setenv("AZURE_STORAGE_USE_EMULATOR", "true")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    container = f"c{abs(hash(tmp_path)) % 10**8}"
    headers = {"x-ms-date": formatdate(usegmt=True), "x-ms-version": "2023-11-03"}
    signed = "\n".join(f"{name}:{value}" for name, value in headers.items())
    text = f"PUT{12 * chr(10)}{signed}\n/{ACCOUNT}/{ACCOUNT}/{container}\nrestype:container"
    digest = hmac.new(base64.b64decode(KEY), text.encode(), hashlib.sha256).digest()
    headers["Authorization"] = f"SharedKey {ACCOUNT}:{base64.b64encode(digest).decode()}"
    url = f"{os.environ[AZURITE]}/{ACCOUNT}/{container}?restype=container"
    assert httpx.put(url, headers=headers, trust_env=False).status_code == 201
    return f"az://{container}/prefix"


@pytest.fixture(params=["gs", "az"])
def cloud(request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue(request.param))


def test_stores_refuse_to_write_a_name_twice(cloud: str) -> None:
    objects = refuses_to_overwrite(cloud)
    assert objects.size("lease/1.json") == 3
    assert objects.modified("lease/1.json") is not None
    for _ in range(2):
        objects.delete("lease/1.json")
    assert objects.listed("") == []


def test_another_machine_gets_the_same_bytes_and_may_not_write(cloud: str, tmp_path: Path) -> None:
    first, second = Machine(tmp_path / "a", cloud), Machine(tmp_path / "b", cloud)
    first.begin()
    first.sample()
    first.judge(3)
    assert first.put().stages == 2
    assert second.pull()
    assert second.files() == first.files()
    with pytest.raises(LeaseHeldError, match="is written from"):
        second.put()
    first.lease.release()
    assert second.lease.take()


@pytest.mark.parametrize(
    ("url", "environment", "kind", "inner"),
    [
        ("s3://bucket/a/b", {}, "S3Store", {"bucket": "bucket"}),
        ("gs://bucket/a/b", {}, "GCSStore", {"bucket": "bucket"}),
        ("az://box/a/b", {"AZURE_STORAGE_ACCOUNT_NAME": "acct"}, "AzureStore",
         {"container_name": "box"}),
    ],
)  # fmt: skip
def test_address_opens_its_own_kind_of_store(
    url: str, environment: dict[str, str], kind: str, inner: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith(("AWS_", "GOOGLE_", "AZURE_"))]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    store = open_objects(url, "c")._store
    assert type(store).__name__ == kind
    assert {name: store.config[name] for name in inner} == inner
    assert store.prefix == "a/b"


@pytest.mark.parametrize(
    ("url", "environment", "said"),
    [
        ("gs://bucket/x", {"GCE_METADATA_HOST": "127.0.0.1:9"}, "set GOOGLE_APPLICATION_CREDENTIALS to the file of"),
        ("gs://bucket/x", {"GOOGLE_APPLICATION_CREDENTIALS": "/nowhere.json"}, "service account file from /nowhere"),
        ("az://box/x", {}, "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY"),
        ("az://box/x", {"AZURE_STORAGE_ACCOUNT_NAME": "acct", "AZURE_STORAGE_ACCOUNT_KEY": "no key"},
         "got no credentials that it accepts; set AZURE_STORAGE_ACCOUNT_NAME"),
    ],
)  # fmt: skip
def test_missing_credentials_are_one_line(
    url: str, environment: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in [name for name in os.environ if name.startswith(("AWS_", "GOOGLE_", "AZURE_"))]:
        monkeypatch.delenv(name)
    for name, value in {"HOME": str(tmp_path), **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(D3POError, match=said) as error:
        open_objects(url, "c", 1).get("lease/1.json")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 250
