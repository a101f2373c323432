"""What a store may answer instead: each is one clear line, and what is missing is put later."""

import http.server
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from d3po_core.errors import D3POError
from d3po_core.mirror.objects import MirrorAwayError, Objects, open_objects
from d3po_core.mirror.told import in_words
from tests.core.mirror.campaigns import Machine


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("ftp://host/x", "expected s3://BUCKET/PREFIX"),
        ("s3://", "expected s3://BUCKET/PREFIX"),
        ("bucket/prefix", "expected s3://BUCKET/PREFIX"),
        ("file://folder", "expected s3://BUCKET/PREFIX"),
        ("s3://key:secret@bucket/x", "holds a user name or password"),
        ("file:///nowhere/at/all", "is no folder; mount it, or make it: mkdir -p /nowhere/at/all"),
    ],
)
def test_address_that_is_none_is_refused(url: str, said: str) -> None:
    with pytest.raises(D3POError, match=said) as error:
        open_objects(url)
    assert "secret@" not in str(error.value)


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(D3POError, match=r"type: pip install 'd3po\[mirror\]'"):
        open_objects("s3://bucket")


def test_bucket_that_does_not_exist_is_named(s3: str) -> None:
    objects = open_objects("s3://no-such-bucket/x", "c")
    steps = (lambda: objects.create("a", b""), lambda: objects.get("a"), lambda: objects.listed("records/"))
    for step in steps:
        with pytest.raises(MirrorAwayError, match=r"s3://no-such-bucket/x/c has no such bucket"):
            step()


class Answering(http.server.BaseHTTPRequestHandler):
    """A store that answers everything with one status and one S3 error code, or not at all."""

    status, code = 503, "SlowDown"
    silent = threading.Event()

    def _answer(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        if self.code == "silence":
            self.silent.wait(10)
        body = f"<Error><Code>{self.code}</Code><Message>no</Message></Error>".encode()
        self.send_response(self.status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = do_DELETE = do_HEAD = _answer

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Answering]]:
    handler: type[Answering] = type("Handler", (Answering,), {"silent": threading.Event()})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_REGION": "us-east-1"}
    for name, value in {**environment, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}"}.items():
        monkeypatch.setenv(name, value)
    yield handler
    handler.silent.set()
    server.shutdown()


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (503, "SlowDown", "is busy"),
        (403, "AccessDenied", "denies permission"),
        (403, "InvalidAccessKeyId", "got no credentials that it accepts"),
        (403, "RequestTimeTooSkewed", "refuses this machine's clock"),
        (500, "InternalError", "an error of its own"),
        (200, "silence", "does not answer in time"),
    ],
)
def test_answer_of_a_store_is_one_line(answering: type[Answering], status: int, code: str, said: str) -> None:
    answering.status, answering.code = status, code
    with pytest.raises(MirrorAwayError, match=said) as error:
        open_objects("s3://bucket/x", "c", 0.7).create("lease/1.json", b"")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 200


def test_server_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch, answering: type[Answering]) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(MirrorAwayError, match="cannot be reached"):
        open_objects("s3://bucket/x", "c", 2).get("lease/1.json")


def test_no_credentials_is_one_line() -> None:
    said = "Generic S3 error: Error performing PUT http://169.254.169.254/latest/api/token in 1ms - HTTP error"
    assert in_words(Exception(said)).startswith("got no credentials that it accepts; set AWS_ACCESS_KEY_ID")


def test_what_failed_half_way_is_put_later(tmp_path: Path, folder_mirror: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store fails after none, one, two... puts; afterwards one more delivery makes the mirror whole."""
    first = Machine(tmp_path / "a", folder_mirror)
    first.begin()
    first.sample()
    first.judge(3)
    create, left, failures = Objects.create, 0, 0

    def failing(self: Objects, name: str, content: bytes) -> bool:
        nonlocal left
        left -= 1
        if left < 0 and not name.startswith("lease/"):
            raise MirrorAwayError("the mirror is busy (503)")
        return create(self, name, content)

    monkeypatch.setattr(Objects, "create", failing)
    for allowed in range(1, 9):
        left = allowed
        try:
            first.put()
        except MirrorAwayError:
            failures += 1
    monkeypatch.undo()
    first.put()
    second = Machine(tmp_path / "b", folder_mirror)
    second.pull()
    assert failures > 2
    assert second.files() == first.files()
