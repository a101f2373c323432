"""The labelling page's server: it closes idle connections, and those with a slow exchange."""

import asyncio
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

IDLE_SECONDS = 10
EXCHANGE_SECONDS = 60.0


class BoundedProtocol(H11Protocol):
    """Ends a connection whose request and answer together take longer than EXCHANGE_SECONDS.

    uvicorn only limits the time between an answer and the first byte of the next request. Without this, a connection
    that never sends anything, sends a byte now and then, or never reads its answer would stay open for ever.
    """

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timer."""
        super().connection_made(transport)
        self._count_anew()

    def on_response_complete(self) -> None:
        """Restart the timer for the next exchange on this connection."""
        self._count_anew()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timer."""
        self._stop()
        super().connection_lost(exc)

    def _count_anew(self) -> None:
        self._stop()
        self._deadline = self.loop.call_later(EXCHANGE_SECONDS, self.transport.abort)

    def _stop(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()


def serve(app: Any, host: str, port: int) -> None:
    """Serve an ASGI application until the process is told to stop; log no requests."""
    uvicorn.run(
        app, host=host, port=port, http=BoundedProtocol, ws="none", log_level="error", access_log=False,
        server_header=False, timeout_keep_alive=IDLE_SECONDS, timeout_graceful_shutdown=3,
    )  # fmt: skip
