"""Requests to the Prefect server of ``d3po up``, with its login and past any proxy; each failure is one line."""

import base64
import time
from typing import Any

import httpx

from d3po.flows.server_files import LOGIN_FILE, Ports, login, server_file
from d3po.flows.server_programs import api_url
from d3po_core.errors import D3POError


def ask(ports: Ports, method: str, path: str, body: Any = None, seconds: float = 30.0) -> Any:
    """The server's answer to a request, None if the thing asked for does not exist.

    Args:
        ports: of our servers.
        method: the HTTP method.
        path: below the API's address.
        body: sent as JSON.
        seconds: how long to wait for a server that is silent or too busy to answer.

    Raises:
        D3POError: the server does not answer, or refuses the login or the request.
    """
    url, deadline = f"{api_url(ports)}{path}", time.monotonic() + seconds
    while True:
        try:
            answer = httpx.request(method, url, json=body, headers=_headers(), timeout=seconds, trust_env=False)
            if answer.status_code == 404:
                return None
            if answer.status_code == 503 and (left := deadline - time.monotonic()) > 0:  # its database is busy
                time.sleep(min(1.0, left))
                continue
            if answer.is_success:
                return answer.json() if answer.content else {}
        except (httpx.HTTPError, ValueError) as error:
            reason = str(error) or type(error).__name__
            raise D3POError(
                f"the Prefect server does not answer {url} ({reason}); see {server_file('prefect.log')}"
            ) from None
        raise D3POError(_refusal(url, answer))


def answers(url: str) -> bool:
    """Return whether a server answers an address with success."""
    try:
        return httpx.get(url, timeout=5, trust_env=False).is_success
    except httpx.HTTPError:
        return False


def _headers() -> dict[str, str]:
    known = login()
    return {"Authorization": f"Basic {base64.b64encode(known.encode()).decode()}"} if known else {}


def _refusal(url: str, answer: httpx.Response) -> str:
    if answer.status_code in (401, 403):
        return (
            f"the Prefect server at {url} refuses the login in {server_file(LOGIN_FILE)}; it was started with "
            "another one: type `d3po down`, then `d3po up`"
        )
    said = " ".join(answer.text.split())[:200]
    return f"the Prefect server answers {url} with {answer.status_code} ({said}); see {server_file('prefect.log')}"
