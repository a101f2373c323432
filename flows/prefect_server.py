"""Prefect's server with a check of host and origin, which Prefect itself lacks.

python -m d3po.flows.prefect_server PORT

Without the check, a page of any site could send requests here from a visitor's browser: directly, or through a host
name that it points to this machine. The login is Prefect's own (``PREFECT_SERVER_API_AUTH_STRING``).
"""

import sys

import uvicorn
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from d3po.flows.loopback import HOST
from d3po.flows.server_programs import own_addresses


def guarded(application: ASGIApp, port: int) -> ASGIApp:
    """Limit an application to requests and websockets for its own host names, from its own pages or no page."""
    origins = own_addresses(port)

    async def own_origin(scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope.get("headers") or ())
        if (origin := headers.get(b"origin")) is not None and origin.decode("latin-1") not in origins:
            await PlainTextResponse("this must come from the server's own page", 403)(scope, receive, send)
            return
        await application(scope, receive, send)

    return TrustedHostMiddleware(own_origin, allowed_hosts=[HOST, "localhost"], www_redirect=False)


def main() -> None:
    """Serve until the process is told to stop."""
    from prefect.server.api.server import create_app
    from prefect.settings import get_current_settings

    port, settings = int(sys.argv[1]), get_current_settings().server
    uvicorn.run(
        guarded(create_app(final=True), port), host=HOST, port=port, log_level=settings.logging_level.lower(),
        timeout_keep_alive=settings.api.keepalive_timeout, server_header=False,
    )  # fmt: skip


if __name__ == "__main__":
    main()
