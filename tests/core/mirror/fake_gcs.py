"""A Google Cloud Storage of a few lines: the requests that obstore makes of it, with conditional puts."""

import http.server
import threading
from datetime import UTC, datetime
from email.utils import format_datetime
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

Stored = tuple[bytes, datetime]


class FakeGcs(http.server.ThreadingHTTPServer):
    """Objects of all buckets, by ``bucket/name``, and the conditions that puts came with."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.stored: dict[str, Stored] = {}
        self.conditions: list[str | None] = []
        self.turn = threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def listing(self, bucket: str, prefix: str) -> bytes:
        entries = [
            f"<Contents><Key>{escape(key)}</Key><LastModified>{at.isoformat()}</LastModified>"
            f"<ETag>e</ETag><Size>{len(content)}</Size></Contents>"
            for name, (content, at) in sorted(self.stored.items())
            if name.startswith(f"{bucket}/") and (key := name.removeprefix(f"{bucket}/")).startswith(prefix)
        ]
        return f"<ListBucketResult><IsTruncated>false</IsTruncated>{''.join(entries)}</ListBucketResult>".encode()


class _Handler(http.server.BaseHTTPRequestHandler):
    server: FakeGcs
    protocol_version = "HTTP/1.1"

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["content-length"]))
        condition = self.headers.get("x-goog-if-generation-match")
        with self.server.turn:
            self.server.conditions.append(condition)
            if condition == "0" and self._name in self.server.stored:
                return self._answer(412, b"<Error><Code>PreconditionFailed</Code></Error>")
            self.server.stored[self._name] = (content, datetime.now(UTC))
        self._answer(200)

    def do_GET(self) -> None:
        path = urlsplit(self.path)
        if "list-type" in path.query:
            prefix = parse_qs(path.query).get("prefix", [""])[0]
            return self._answer(200, self.server.listing(path.path.strip("/"), prefix))
        if self._name not in self.server.stored:
            return self._answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        content, at = self.server.stored[self._name]
        self._answer(200, content, {"Last-Modified": format_datetime(at, usegmt=True)})

    do_HEAD = do_GET

    def do_DELETE(self) -> None:
        self._answer(204 if self.server.stored.pop(self._name, None) else 404)

    @property
    def _name(self) -> str:
        return unquote(urlsplit(self.path).path).strip("/")

    def _answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"ETag": "e", "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass
