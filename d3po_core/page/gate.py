"""Checks before every request: known hosts, own origin, small bodies, a pace; and headers for the browser."""

import threading
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
MAX_BODY = 16 * 1024
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}


class Guard:
    """ASGI middleware that refuses bad requests itself.

    Args:
        application: the application behind it.
        hosts: names under which the page may be reached; any other ``Host`` is a rebound or mistyped name.
        remedy: what to do about an unknown name.
    """

    def __init__(
        self, application: Application, hosts: Iterable[str] = LOCAL_HOSTS,
        remedy: str = "start with d3po label --allow-host NAME",
    ) -> None:  # fmt: skip
        self._application, self._hosts = application, frozenset(host.lower() for host in hosts)
        self._unknown_host = f"this name is not known here; {remedy}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Refuse the request, or pass it on."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._application(scope, receive, send)
            else:
                await send({"type": "websocket.close", "code": 1008})
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self._refusal(scope["method"], headers)
        body = b""
        if refusal is None and scope["method"] == "POST":
            # Read the body here, up to the limit, since its length may be missing or wrong.
            more = True
            while more and len(body) <= MAX_BODY:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return
                body += message.get("body", b"")
                more = message.get("more_body", False)
            refusal = (413, f"at most {MAX_BODY} bytes") if len(body) > MAX_BODY else None
        if refusal:
            await _answer(send, *refusal)
            return
        whole = {"type": "http.request", "body": body, "more_body": False}
        pending = [whole]

        async def replay() -> MutableMapping[str, Any]:
            return pending.pop() if pending else await receive()

        async def bound(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                own = {name for name, _ in message["headers"]}
                added = [(n.encode(), v.encode()) for n, v in HEADERS.items() if n.encode() not in own]
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        await self._application(scope, replay, bound)

    def _refusal(self, method: str, headers: dict[str, str]) -> tuple[int, str] | None:
        host = headers.get("host", "")
        if _hostname(host) not in self._hosts:
            return 400, self._unknown_host
        if method in ("GET", "HEAD"):
            return None
        if method != "POST":
            return 405, "GET and POST only"
        origin = headers.get("origin", "")
        if not origin or _origin_host(origin) != host.lower():
            return 403, "this must come from the page itself"
        if headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            return 415, "JSON only"
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit() and len(length) < 10) or int(length) > MAX_BODY:
            return 413, f"at most {MAX_BODY} bytes"
        return None


class Pace:
    """Limits how often a caller may do something, with a bucket that refills.

    Args:
        per_second: rate at which it refills.
        burst: how many at once.
    """

    def __init__(self, per_second: float, burst: float) -> None:
        self._rate, self._burst = per_second, burst
        self._lock = threading.Lock()
        self._levels: dict[str, tuple[float, float]] = {}

    def allows(self, caller: str) -> bool:
        """Return whether the caller may do it now; if so, count it."""
        now = time.monotonic()
        with self._lock:
            if len(self._levels) > 10_000:  # unknown callers must not fill the memory
                self._levels.clear()
            level, at = self._levels.get(caller, (self._burst, now))
            level = min(self._burst, level + (now - at) * self._rate)
            allowed = level >= 1
            self._levels[caller] = (level - allowed, now)
            return allowed


def _hostname(host: str) -> str:
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def _origin_host(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return None


async def _answer(send: Send, status: int, text: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    headers += [(name.encode(), value.encode()) for name, value in HEADERS.items()]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})
