"""What a rater, or a stranger, may send: refused with 4xx, nothing kept, nothing echoed, and the next answer works."""

import asyncio
import contextlib
import json
import os
import re
import socket
import sqlite3
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from d3po_core.page import serving
from d3po_core.page.access import RATERS_FILE, Raters
from d3po_core.page.app import create_app
from d3po_core.page.desks import Desks
from d3po_core.people.journal import JOURNAL_FILE, Journal, read_entries, sampling_of
from d3po_core.store.stages import stage_path
from tests.core.page.test_page import ORIGIN, Rater, eventually, nobody, said, served
from tests.core.people.labelling import bring_in, waiting_campaign

SECRET = "PlEaSe-EcHo-Me"
DIGITS = "9" * 300


def answer(values: str) -> str:
    """The body of an answer as text, with values that json.dumps would not write."""
    return f'{{"ticket": TICKET, "submission": ID, "action": "answer", "values": [{values}]}}'


def skip(*fields: str) -> str:
    """The body of a skip with other fields; the last of two with one name counts."""
    return "{" + ", ".join(['"ticket": TICKET, "submission": ID, "action": "skip"', *fields]) + "}"


JUDGED: dict[str, str | bytes] = {
    "not a number": answer("NaN, 1, 1"),
    "infinity": answer("Infinity, 1, 1"),
    "minus infinity": answer("1, 1, -Infinity"),
    "1e999": answer("1e999, 1, 1"),
    "300 digits": answer(f"{DIGITS}, 1, 1"),
    "400 digits": answer(f"{DIGITS}{DIGITS}, 1, 1"),
    "6000 digits": answer(f"{DIGITS * 20}, 1, 1"),
    "text": answer(f'"{SECRET}", 1, 1'),
    "surrogate in values": answer('"\\ud800", 1, 1'),
    "wrong values": answer("77123, 1, 1"),
    "too many values": answer(", ".join(["1"] * 65)),
    "surrogate in ticket": skip(f'"ticket": "\\ud800{SECRET}"'),
    "surrogate in submission": skip('"submission": "\\udfff"'),
    "surrogate in action": skip('"action": "\\ud800"'),
    "surrogate as name": skip('"\\ud800": 1'),
    "seconds not a number": skip('"seconds": NaN'),
    "seconds without end": skip('"seconds": 1e999'),
    "seconds of years": skip('"seconds": 1e9'),
    "seconds below nothing": skip('"seconds": -1e-9'),
    "seconds of 300 digits": skip(f'"seconds": {DIGITS}'),
    "another action": skip(f'"action": "{SECRET}"'),
    "one more field": skip(f'"{SECRET}": 1'),
    "a name that is none": skip(f'"submission": "{SECRET}"'),
    "a name that ends in a line": skip(f'"submission": "{"a" * 32}\\n"'),
    "a ticket of 10 kB": skip(f'"ticket": "{SECRET * 700}"'),
    "null": "null",
    "a list": f'["{SECRET}"]',
    "a number": "1e999",
    "half of it": '{"ticket": TICKET, "submission": ID, "act',
    "nothing": "",
    "deep": "[" * 16000,
    "no text": b"\xff\xfe\x00" + SECRET.encode(),
}
# Put in place of the parts of the ticket that is asked: round, sampling, attempt, question.
TICKETS = {
    "an attempt that was never offered": (None, None, "1", None),
    "an attempt of 2^63": (None, None, str(2**63), None),
    "an attempt of 2^63 - 1": (None, None, str(2**63 - 1), None),
    "an attempt of 300 digits": (None, None, "9" * 300, None),
    "an attempt below nothing": (None, None, "-1", None),
    "an attempt in other digits": (None, None, "\u0661", None),
    "an attempt with a superscript": (None, None, "\u00b2", None),
    "a round of 300 digits": ("9" * 300, "ab", None, None),
    "a round of 2^63": (str(2**63), "ab", None, None),
    "a round that is not there": ("7", "ab", None, None),
    "a round below nothing": ("-1", "ab", None, None),
    "a path as sampling": (None, "../../raters.json", None, None),
    "another sampling": (None, "0" * 16, None, None),
    "a question that is not asked": (None, None, None, f"mark_bad:{SECRET}"),
    "a mode that is none": (None, "ab", None, f"sing:{SECRET}"),
    "a NUL": (None, None, None, "mark_bad:r1-g0\0"),
}
UNDONE = {
    "an entry of 300 digits": DIGITS,
    "an entry of 2^63": str(2**63),
    "an entry not a number": "NaN",
    "an entry in halves": "0.5",
    "an entry that is true": "true",
    "an entry below nothing": "-1",
    "an entry with a surrogate": '"\\ud800"',
}


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rater]:
    """A rater in front of a question; no attack may change what is asked."""
    data = tmp_path_factory.mktemp("data")
    waiting_campaign(data, groups=2, pixels=1)
    with served(data) as enter:
        yield enter()


def sent(rater: Rater, where: str, body: str | bytes) -> httpx.Response:
    if isinstance(body, str):
        named = body.replace("TICKET", json.dumps(rater.ticket)).replace("ID", json.dumps(uuid.uuid4().hex))
        body = named.encode()
    headers = {"origin": ORIGIN, "content-type": "application/json"}
    return rater.http.post(f"/c/x/{where}", content=body, headers=headers)


def refused(rater: Rater, response: httpx.Response) -> None:
    assert 400 <= response.status_code < 500, (response.status_code, response.text[:200])
    assert list(response.json()) == ["error"]
    for echo in (SECRET, "ud800", "\\ud", "NaN", "Infinity", "9" * 20, "77123", "922337"):
        assert echo not in response.text
    ticket = rater.ticket
    assert rater.open().ticket == ticket
    folder = next(Path(rater.data).glob("runs/x"))
    assert read_entries(folder, str(sampling_of(folder, 1))) == []


@pytest.mark.parametrize("attack", JUDGED)
def test_an_odd_judgement_is_refused_and_nothing_is_kept(attacked: Rater, attack: str) -> None:
    refused(attacked, sent(attacked, "judge", JUDGED[attack]))


@pytest.mark.parametrize("attack", TICKETS)
def test_a_ticket_that_was_made_up_is_refused_and_nothing_is_kept(attacked: Rater, attack: str) -> None:
    asked = attacked.ticket.split(".", 3)
    ticket = ".".join(made or part for made, part in zip(TICKETS[attack], asked, strict=True))
    body = json.dumps({"ticket": ticket, "submission": uuid.uuid4().hex, "action": "skip"})
    refused(attacked, sent(attacked, "judge", body.encode()))


@pytest.mark.parametrize("attack", UNDONE)
def test_an_odd_undo_is_refused_and_nothing_is_kept(attacked: Rater, attack: str) -> None:
    refused(attacked, sent(attacked, "undo", f'{{"submission": ID, "entry": {UNDONE[attack]}}}'))


@pytest.mark.parametrize(
    ("headers", "status"),
    [({"origin": "http://["}, 403), ({"origin": "http://\u212a"}, 403), ({"origin": "null"}, 403),
     ({"content-length": "\u00b2"}, 413), ({"content-length": "9" * 5000}, 413), ({"host": "127.0.0.1]"}, 400),
     ({"content-type": "application/json; charset=\u00ff"}, 422), ({"cookie": "d3po_label=\u00ff\u00fe"}, 401)],
)  # fmt: skip
def test_odd_headers_are_refused(attacked: Rater, headers: dict[str, str], status: int) -> None:
    usual = {"origin": ORIGIN, "content-type": "application/json"}
    raw = {name: value.encode("utf-8" if name == "origin" else "latin-1") for name, value in (usual | headers).items()}
    assert attacked.http.post("/c/x/judge", content=b"{}", headers=raw).status_code == status


def test_a_websocket_is_turned_away_before_anything_is_looked_at(attacked: Rater) -> None:
    from starlette.websockets import WebSocketDisconnect

    for path in ("/", "/c/x", "/c/x/judge", "/nothing"):
        with pytest.raises(WebSocketDisconnect), attacked.http.websocket_connect(path):
            pass


def test_an_attempt_that_was_made_up_in_an_older_journal_leaves_undo_working(tmp_path: Path) -> None:
    config = waiting_campaign(tmp_path, groups=1, raters_per_group=2, pixels=1)
    sampling = str(sampling_of(config.folder, 1))
    Journal(config.folder).close()
    with contextlib.closing(sqlite3.connect(config.folder / JOURNAL_FILE)) as connection:
        shown = json.dumps([f"r1-g0-m{m}" for m in range(3)])
        row = ("f" * 32, sampling, "ann", "mark_bad:r1-g0", 3, "skip", "mark_bad", shown, 1)
        connection.execute(
            "INSERT INTO entries (submission, sampling, rater, question_id, attempt, action, mode, shown, judged_at) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row
        )  # fmt: skip
        connection.commit()
    with served(tmp_path) as enter:
        ann = enter()
        for _ in range(4):
            assert ann.judge([0, 1, 1]).status_code == 200
            assert ann.undo() == "Taken back."
    assert [entry.attempt for entry in read_entries(config.folder, sampling)] == [3, *range(4, 12)]


# ------------------------------------------------------------------------------------------- letting in


@pytest.mark.parametrize(
    "content",
    ["[]", "{}", "null", '{"secret": "ab", "raters": {}}', '{"secret": "zz", "raters": []}', '{"raters": {"ann": 3}}',
     f'{{"secret": "{"ab" * 32}", "raters": {{"ann": ""}}}}', f'{{"secret": "{"ab" * 32}", "raters": {{"ann": null}}}}',
     "[" * 100_000, "\ufeff{", ""],
)  # fmt: skip
def test_an_odd_file_of_raters_lets_nobody_in_and_shows_nothing_of_it(tmp_path: Path, content: str) -> None:
    waiting_campaign(tmp_path, pixels=1)
    path = tmp_path / RATERS_FILE
    path.write_text(content)
    path.chmod(0o600)
    app = create_app(tmp_path, nobody)
    client = TestClient(app, base_url=ORIGIN)
    for url in ("/", "/enter?key=", "/c/x", f"/i/{'a' * 32}"):
        response = client.get(url)
        assert response.status_code == 503, url
        assert str(tmp_path) not in response.text
        assert "own log" in response.text


def test_a_file_of_raters_that_others_can_read_shows_no_path(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    waiting_campaign(tmp_path, pixels=1)
    Raters(tmp_path).token("ann")
    (tmp_path / RATERS_FILE).chmod(0o644)
    response = TestClient(create_app(tmp_path, nobody), base_url=ORIGIN).get("/")
    assert response.status_code == 503
    assert RATERS_FILE not in response.text
    assert "chmod 600" in capsys.readouterr().err


def test_wrong_tries_never_lock_a_good_link_out(tmp_path: Path) -> None:
    waiting_campaign(tmp_path, pixels=1)
    token = Raters(tmp_path).token("ann")
    client = TestClient(create_app(tmp_path, nobody), base_url=ORIGIN)
    statuses = {client.get("/enter", params={"key": f"guess{n}"}).status_code for n in range(60)}
    assert statuses == {401, 429}
    assert client.get("/enter", params={"key": token}).status_code == 200
    assert client.get("/").status_code == 200


def test_a_link_of_another_rater_asks_before_it_replaces_the_cookie(tmp_path: Path) -> None:
    waiting_campaign(tmp_path, pixels=1)
    ann, bob = (Raters(tmp_path).token(name) for name in ("ann", "bob"))
    client = TestClient(create_app(tmp_path, nobody), base_url=ORIGIN)
    client.get("/enter", params={"key": ann})
    for instead in ("", "yes", "\u00e9"):
        asked = client.get("/enter", params={"key": bob, "instead": instead})
        assert "set-cookie" not in asked.headers
        assert "You are ann here" in asked.text
    assert "What waits for you, ann" in client.get("/").text
    [button] = re.findall(r'href="(/enter[^"]+)"', asked.text)
    assert "set-cookie" in client.get(button.replace("&amp;", "&")).headers
    assert "What waits for you, bob" in client.get("/").text


def test_a_link_from_elsewhere_comes_again_from_here_so_that_the_cookie_is_seen(tmp_path: Path) -> None:
    waiting_campaign(tmp_path, pixels=1)
    token = Raters(tmp_path).token("ann")
    client = TestClient(create_app(tmp_path, nobody), base_url=ORIGIN)
    first = client.get("/enter", params={"key": token}, headers={"sec-fetch-site": "cross-site"})
    assert "set-cookie" not in first.headers
    assert f'content="0; url=/enter?key={token}"' in first.text
    again = client.get("/enter", params={"key": token}, headers={"sec-fetch-site": "same-origin"})
    assert "set-cookie" in again.headers


# ------------------------------------------------------------------------------------------- damage


def test_a_damaged_campaign_is_shown_and_takes_no_other_down(tmp_path: Path) -> None:
    config = waiting_campaign(tmp_path, "x", groups=1, pixels=1)
    for name in ("no-json", "a-list", "no-samples", "no-journal", "odd-round"):
        waiting_campaign(tmp_path, name, pixels=1)
    runs = tmp_path / "runs"
    (runs / "no-json/campaign.json").write_text("{")
    (runs / "a-list/campaign.json").write_text("[]")
    next(runs.glob("no-samples/samples/round=1/*.parquet")).write_bytes(b"PAR1")
    (runs / "no-journal" / JOURNAL_FILE).write_bytes(b"not a database" * 100)
    (runs / "odd-round/stages/round=one").mkdir()
    (runs / "odd-round/stages/round=one/sample.json").write_text("{}")
    (runs / "x/comparisons").mkdir()
    (runs / "x/comparisons/1-0.json").write_text("{")
    told: list[str] = []
    with served(tmp_path, lambda name, _: told.append(name)) as enter:
        ann = enter()
        page = ann.http.get("/")
        assert page.status_code == 200
        assert str(tmp_path) not in page.text
        for name in ("no-json", "a-list"):
            assert f"{name} cannot be shown" in page.text
        assert "x cannot be shown: runs/x/comparisons/1-0.json" in page.text
        for name in ("no-samples", "no-journal", "odd-round"):
            assert re.search(rf'href="/c/{name}">.*?at the moment: \S', page.text, re.S), name
            assert 'role="alert"' in ann.http.get(f"/c/{name}").text
        bring_in(config, [{"sample_id": f"r1-g0-m{m}"} for m in range(3)])
        eventually(lambda: told == ["x"])  # nobody asked: it is the watcher who saw it


def test_one_error_does_not_end_the_watcher_and_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from d3po_core.page import app, desk

    config = waiting_campaign(tmp_path, groups=1, pixels=1)
    monkeypatch.setattr(app, "WATCH_SECONDS", 0.05)
    told: list[str] = []
    with served(tmp_path, lambda name, _: told.append(name)) as enter:
        ann = enter()
        with monkeypatch.context() as broken:
            broken.setattr(desk, "waiting_round", lambda _: (_ for _ in ()).throw(OSError(5, "Input/output error")))
            eventually(lambda: "Input/output error" in ann.http.get("/").text)
            time.sleep(0.2)
        with monkeypatch.context() as broken:
            broken.setattr(Desks, "listed", lambda _: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
            time.sleep(0.2)
        bring_in(config, [{"sample_id": f"r1-g0-m{m}"} for m in range(3)])
        eventually(lambda: told == ["x"])


def test_a_journal_that_is_renamed_takes_no_answer_until_it_is_back(tmp_path: Path) -> None:
    config = waiting_campaign(tmp_path, groups=3, pixels=1)
    path, away = config.folder / JOURNAL_FILE, config.folder / "away.sqlite"
    with served(tmp_path) as enter:
        ann = enter()
        assert ann.judge([0, 1, 1]).status_code == 200
        os.rename(path, away)
        response = ann.judge([0, 1, 1])
        assert response.status_code == 503
        assert "moved, removed or replaced" in response.json()["error"]
        assert not path.exists()
        path.write_bytes(away.read_bytes())
        assert ann.judge([0, 1, 1]).status_code == 503
        os.replace(away, path)
        assert ann.judge([0, 1, 1]).status_code == 200
    assert len(said(config)) == 2


def test_an_answer_after_the_round_was_discarded_is_not_told_saved(tmp_path: Path) -> None:
    config = waiting_campaign(tmp_path, groups=3, pixels=1)
    with served(tmp_path) as enter:
        ann = enter()
        assert ann.judge([0, 1, 1]).status_code == 200
        stage_path(config.folder, 1, "sample").unlink()  # what discard-round does first
        assert ann.judge([0, 1, 1]).status_code == 410


# ------------------------------------------------------------------------------------------- gold


@pytest.mark.parametrize("people", [{}, {"raters_per_group": 2}])
def test_a_question_with_a_known_answer_moves_what_is_shown_like_any_other(
    tmp_path: Path, people: dict[str, Any]
) -> None:
    config = waiting_campaign(tmp_path, groups=12, pixels=1, labeller="mixed", share=0.5, **people)
    rows = [{"sample_id": f"r1-g{g}-m{m}", "rater": "p", "rater_kind": "proxy", "kind": "score", "value": float(m * g)}
            for g in range(12) for m in range(3)]  # fmt: skip
    rows += [
        {"sample_id": f"r1-g{g}-m{m}", "rater": "key", "rater_kind": "gold"} for g in (0, 9, 10, 11) for m in range(3)
    ]
    bring_in(config, rows)
    numbers = r'<progress value="(\d+)"\s+max="(\d+)"'
    with served(tmp_path) as enter:
        ann = enter()
        asked, moved, started = set(), set(), set()
        while ann.state == "question":
            asked.add(ann.ticket.rpartition(":")[2])
            before, at_start = re.findall(numbers, ann.html), re.findall(numbers, ann.http.get("/").text)
            ann.judge([0, 1, 1])
            if ann.state == "done":
                break
            after, after_start = re.findall(numbers, ann.html), re.findall(numbers, ann.http.get("/").text)
            moved.add((int(after[0][0]) - int(before[0][0]), after[0][1] == before[0][1]))
            started.add((int(after_start[0][0]) - int(at_start[0][0]), after_start[0][1] == at_start[0][1]))
        assert asked & {"r1-g9", "r1-g10", "r1-g11"}, "no question was asked for its known answer alone"
        assert moved == started == {(1, True)}


# ------------------------------------------------------------------------------------------- connections


HOST = b"Host: 127.0.0.1\r\n"
BODY = HOST + b"Origin: http://127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 900\r\n\r\n{"


@pytest.mark.parametrize(
    "first",
    [b"", b"GET / HTTP/1.1\r\n" + HOST + b"X-", b"POST /c/x/judge HTTP/1.1\r\n" + BODY,
     b"GET /health HTTP/1.1\r\n" + HOST + b"\r\n"],
    ids=["silent", "slow headers", "slow body", "slow second request"],
)  # fmt: skip
def test_a_connection_that_waits_or_trickles_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: bytes
) -> None:
    import uvicorn

    monkeypatch.setattr(serving, "EXCHANGE_SECONDS", 0.5)
    config = uvicorn.Config(create_app(tmp_path, nobody), http=serving.BoundedProtocol, ws="none", log_level="error")
    config.load()

    async def seconds_open() -> float:
        loop = asyncio.get_running_loop()
        state = uvicorn.server.ServerState()
        server = await loop.create_server(lambda: serving.BoundedProtocol(config, state, {}), "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        started = loop.time()
        writer.write(first)
        with contextlib.suppress(OSError):
            while not reader.at_eof() and loop.time() - started < 10:
                if first:
                    writer.write(b"a")
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(reader.read(1000), 0.05)
        writer.close()
        server.close()
        return loop.time() - started

    assert asyncio.run(seconds_open()) < 3


def test_a_server_that_prints_into_a_log_prints_no_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from d3po.flows.commands import label as label_command

    monkeypatch.setenv("D3PO_DATA", str(tmp_path))
    monkeypatch.setattr(serving, "serve", lambda *_: None)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    label_command.serve_page(nobody, None, ["ann"], None, "127.0.0.1", port, None)
    printed = capsys.readouterr().out
    assert Raters(tmp_path).token("ann") not in printed
    assert f"ann: to get the link, type: d3po label --rater ann --port {port}\n" in printed
