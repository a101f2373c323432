"""A scorer behind HTTP against a real server on this machine: the protocol, and what a server may do wrong."""

import base64
import contextlib
import io
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
from PIL import Image

from d3po_core.config import ScoringConfig
from d3po_core.errors import D3POError
from d3po_core.scorers import remote
from d3po_core.scorers.finding import Scorer, load_scorer

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 8, 12, 3), dtype=np.uint8)
PROMPTS = ["a", "bb", "ccc", "zwölf", ""]

# What the server answers to the content of a request, and how often it was asked: status, headers, body; or nothing.
Answer = Callable[[dict[str, Any], int], tuple[int, dict[str, str], bytes] | None]


def decoded(images: list[str]) -> np.ndarray:
    return np.stack([np.asarray(Image.open(io.BytesIO(base64.b64decode(image)))) for image in images])


def ok(scores: Any) -> tuple[int, dict[str, str], bytes]:
    return 200, {}, json.dumps({"scores": scores}).encode()


def judge(content: dict[str, Any], asked: int) -> tuple[int, dict[str, str], bytes]:
    pixels = decoded(content["images"]).astype(float)
    return ok([image.sum() + len(prompt) for image, prompt in zip(pixels, content["prompts"], strict=True)])


EXPECTED = [image.astype(float).sum() + len(prompt) for image, prompt in zip(IMAGES, PROMPTS, strict=True)]


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the scorer would have slept."""
    slept: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", slept.append)
    return slept


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Answer], tuple[str, list[dict[str, Any]]]]]:
    """Start servers that answer; each is known by its URL and the contents of the requests that it got."""
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    servers: list[ThreadingHTTPServer] = []

    def start(answer: Answer) -> tuple[str, list[dict[str, Any]]]:
        got: list[dict[str, Any]] = []

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                answered = answer(got[-1], len(got))
                if answered is None:  # hangs up
                    self.close_connection = True
                    return
                status, headers, body = answered
                self.send_response(status)
                for name, value in (headers | {"Content-Length": str(len(body))}).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        servers.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return f"http://127.0.0.1:{server.server_address[1]}/score", got

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


Serve = Callable[[Answer], tuple[str, list[dict[str, Any]]]]


def scorer(url: str, **options: Any) -> Scorer:
    return load_scorer("taste", ScoringConfig(models={"taste": url}, **options))


def refusal(url: str, **options: Any) -> str:
    with pytest.raises(D3POError) as caught:
        scorer(url, **options)(IMAGES, PROMPTS)
    assert f"scorer 'taste': {url} " in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_image_gets_the_score_of_itself_and_its_prompt_in_batches(serve: Serve) -> None:
    url, got = serve(judge)
    assert scorer(url, batch_size=2)(IMAGES, PROMPTS).tolist() == EXPECTED
    assert [content["prompts"] for content in got] == [["a", "bb"], ["ccc", "zwölf"], [""]]
    assert np.array_equal(np.concatenate([decoded(content["images"]) for content in got]), IMAGES)


def test_any_name_may_be_a_server_also_that_of_a_learned_scorer(serve: Serve) -> None:
    url, _ = serve(judge)
    score = load_scorer("pickscore", ScoringConfig(models={"pickscore": url}))
    assert score(IMAGES, PROMPTS).tolist() == EXPECTED


@pytest.mark.parametrize("trouble", [(503, {}, b"warming up"), (500, {}, b""), (429, {}, b"busy"), None])
def test_server_that_fails_twice_is_asked_a_third_time(
    trouble: tuple[int, dict[str, str], bytes] | None, serve: Serve, pauses: list[float]
) -> None:
    url, got = serve(lambda content, asked: trouble if asked <= 2 else judge(content, asked))
    assert scorer(url)(IMAGES, PROMPTS).tolist() == EXPECTED
    assert len(got) == 3
    assert got[0] == got[2]
    assert pauses == [1, 2]


def test_busy_server_says_how_long_to_wait_up_to_a_minute(serve: Serve, pauses: list[float]) -> None:
    waits = {1: "7", 2: "100000", 3: "Wed, 21 Oct 2015 07:28:00 GMT"}
    url, _ = serve(
        lambda content, asked: (429, {"Retry-After": waits[asked]}, b"") if asked in waits else judge(content, asked)
    )
    assert scorer(url)(IMAGES, PROMPTS).tolist() == EXPECTED
    assert pauses == [7, 60, 4]  # a date is not read: the pause doubles as ever


@pytest.mark.parametrize("wanted", ["\u00b2", "1e9", "-5", "nan", "9" * 400])
def test_a_pause_that_is_no_number_of_seconds_is_not_taken(wanted: str, serve: Serve, pauses: list[float]) -> None:
    url, _ = serve(lambda content, asked: (503, {"Retry-After": wanted}, b"") if asked < 2 else judge(content, asked))
    assert scorer(url)(IMAGES, PROMPTS).tolist() == EXPECTED
    assert pauses == [60 if wanted.isascii() and wanted.isdigit() else 1]


@pytest.mark.parametrize("head", [b"HTTP/1.1 200 OK\r\nContent-Length: 9000\r\n\r\n", b"HTTP/1.1 200 OK\r\nX-Slow: "])
def test_server_that_trickles_is_given_up_when_the_whole_answer_is_late(head: bytes, pauses: list[float]) -> None:
    over = threading.Event()

    def trickle(connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            connection.recv(65536)
            connection.sendall(head)
            while not over.wait(0.02):
                connection.sendall(b"1")

    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            for _ in range(2):
                threading.Thread(target=trickle, args=(server.accept()[0],), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        started = time.monotonic()
        try:
            message = refusal(f"http://127.0.0.1:{server.getsockname()[1]}/", tries=2, timeout_seconds=0.2)
        finally:
            over.set()
    assert "did not answer (ReadTimeout: no whole answer within 0.2 s)" in message
    assert time.monotonic() - started < 5
    assert pauses == [1]


def test_an_answer_without_end_is_refused_at_once(serve: Serve, pauses: list[float]) -> None:
    url, got = serve(lambda content, asked: (200, {}, b" " * (remote.LARGEST_ANSWER + 1) + b'{"scores": [1]}'))
    assert "answered more than 4194304 bytes" in refusal(url)
    assert (len(got), pauses) == (1, [])


def test_server_that_stays_broken_is_given_up(serve: Serve, pauses: list[float]) -> None:
    url, got = serve(lambda content, asked: (503, {}, b"<html>\n  out of order </html>"))
    assert "answered 503: <html> out of order </html>, asked 4 times; is it running?" in refusal(url, tries=4)
    assert (len(got), pauses) == (4, [1, 2, 4])


def test_server_that_is_away_is_given_up(serve: Serve, pauses: list[float]) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        message = refusal(f"http://127.0.0.1:{unused.getsockname()[1]}/", tries=2)
    assert "did not answer (ConnectError" in message
    assert pauses == [1]


def test_server_that_is_too_slow_is_given_up(serve: Serve, pauses: list[float]) -> None:
    over = threading.Event()

    def slow(content: dict[str, Any], asked: int) -> None:
        over.wait(30)

    url, _ = serve(slow)
    try:
        assert "did not answer (ReadTimeout" in refusal(url, tries=2, timeout_seconds=0.05)
    finally:
        over.set()
    assert pauses == [1]


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ((404, {}, b"no such page"), "answered 404: no such page"),
        ((302, {"Location": "/elsewhere"}, b""), "answered 302: nothing"),
        ((400, {}, b"too many images"), "answered 400: too many images"),
        ((200, {}, b"<html>hello</html>"), "answered <html>hello</html>; expected {'scores': [number, ...]}"),
        ((200, {}, b""), "answered nothing; expected {'scores': [number, ...]}"),
        ((200, {}, b"\xff\xfe"), "expected {'scores': [number, ...]}"),
        ((200, {}, b'{"score": [1]}'), "(scores: Field required)"),
        ((200, {}, b"[1, 2, 3, 4, 5]"), "expected {'scores': [number, ...]}"),
        (ok(3), "(scores: Input should be a valid array)"),
        (ok([1, 2, "3", 4, 5]), "(scores.2: Input should be a valid number)"),
        (ok([1, None, 3, 4, 5]), "(scores.1: Input should be a valid number)"),
        (ok([1, 2, 3, [4], 5]), "(scores.3: Input should be a valid number)"),
        (ok([1, 2, 3, 4, float("nan")]), "(scores.4: Input should be a finite number)"),
        (ok([1, 2, 3, 4, float("-inf")]), "(scores.4: Input should be a finite number)"),
        (ok([1, 2, 3, 4, 10**400]), "(scores.4: Input should be a"),
        (ok([1, 2, 3, 4]), "answered 4 scores for 5 images; expected one for each"),
        (ok([]), "answered 0 scores for 5 images"),
        (ok([1, 2, 3, 4, 5, 6]), "answered 6 scores for 5 images"),
    ],
)
def test_wrong_answer_is_an_error_at_once(
    answer: tuple[int, dict[str, str], bytes], problem: str, serve: Serve, pauses: list[float]
) -> None:
    url, got = serve(lambda content, asked: answer)
    assert problem in refusal(url)
    assert (len(got), pauses) == (1, [])


def test_long_answer_is_shortened(serve: Serve) -> None:
    url, _ = serve(lambda content, asked: (200, {}, b"x" * 100_000))
    assert len(refusal(url)) < 500


@pytest.mark.parametrize("url", ["http://", "http:///score", "https://host:port/"])
def test_url_that_is_none_is_known_before_anything_is_asked(url: str) -> None:
    with pytest.raises(D3POError, match="not a URL"):
        scorer(url)


def test_a_login_and_a_key_come_from_the_environment(
    serve: Callable[[Answer], tuple[str, list[dict[str, Any]]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCORER_LOGIN", "ann:s3cret")
    monkeypatch.setenv("SCORER_KEY", "k 3&y")
    url, got = serve(judge)
    named = url.replace("://", "://${SCORER_LOGIN}@") + "?key=${SCORER_KEY}"
    scorer = load_scorer("taste", ScoringConfig(models={"taste": named}))
    assert scorer(IMAGES, PROMPTS) == pytest.approx(EXPECTED)
    assert len(got) == 1
    broken, _ = serve(lambda *_: (400, {}, b"no"))
    named = broken.replace("://", "://${SCORER_LOGIN}@") + "?key=${SCORER_KEY}"
    with pytest.raises(D3POError, match="answered 400") as error:
        load_scorer("taste", ScoringConfig(models={"taste": named}))(IMAGES, PROMPTS)
    assert "${SCORER_LOGIN}" in str(error.value)
    assert "s3cret" not in str(error.value)
    assert "k%203" not in str(error.value)
