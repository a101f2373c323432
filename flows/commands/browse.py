"""``d3po browse``: serve a page with every image of every campaign."""

import secrets
from typing import Annotated

import typer

from d3po_core.errors import D3POError


def browse(
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on")] = 8710,
) -> None:
    """Serve a page with all images and their stories, and a table of campaigns; Ctrl-C ends it."""
    import socket

    from d3po_core.browser.app import create_app
    from d3po_core.page.serving import serve

    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise D3POError(f"port {port} of 127.0.0.1 is in use; give another one: d3po browse --port {port + 1}")
    secret = secrets.token_urlsafe(32)
    print(f"http://127.0.0.1:{port}/enter?key={secret}", flush=True)
    print("Whoever has this link can see all images. Ctrl-C ends the page.", flush=True)
    serve(create_app(secret), "127.0.0.1", port)
