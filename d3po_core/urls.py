"""Addresses that may hold secrets: mask them, refuse inline ones, and fill in those from the environment."""

import os
import re
from collections.abc import Iterator
from urllib.parse import parse_qsl, quote, urlsplit, urlunsplit

from d3po_core.errors import D3POError

HIDDEN = "***"
# An environment variable's name in braces: we store the name and send its value.
NAMED = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_SECRET_WORDS = ("key", "token", "secret", "passw", "pwd", "auth", "sig", "credential", "session", "code")
_SECRET_NAME = re.compile("|".join(_SECRET_WORDS), re.IGNORECASE)
_LOGIN = re.compile(r"(?<=://)[^/?#\s'\"]*@")
_QUERY = re.compile(r"([?&;])([^=&;#\s'\"]+)=([^&;#\s'\"]*)")


def schema_pattern() -> str:
    """Return a JSON Schema pattern of addresses without an inline secret; Prefect refuses others unstored."""
    words = "|".join("".join(f"[{letter.upper()}{letter}]" for letter in word) for word in _SECRET_WORDS)
    name = r"\$\{[A-Za-z_][A-Za-z0-9_]*\}"
    login = rf"(?!https?://(?!({name}:?)+@)[^/?#]*@)"
    query = rf"(?!https?://[^#]*[?&;][^=&;#]*({words})[^=&;#]*=(?!({name})+([&;#]|$))[^&;#])"
    return f"^{login}{query}"


def masked(text: str) -> str:
    """Return a text with the login and the secret query values of every address hidden.

    Names in braces, which stand for environment variables, are not secrets and stay.
    """

    def login(found: re.Match[str]) -> str:
        return found[0] if _is_named(found[0][:-1]) else f"{HIDDEN}@"

    def value(found: re.Match[str]) -> str:
        secret = found[3] and _SECRET_NAME.search(found[2]) and not _is_named(found[3])
        return f"{found[1]}{found[2]}={HIDDEN if secret else found[3]}"

    return _QUERY.sub(value, _LOGIN.sub(login, text)) if "://" in text else text


def _is_named(text: str) -> bool:
    """Return whether a text consists only of environment variables' names in braces and colons."""
    return not NAMED.sub("", text).strip(":")


def inline_secret(url: str) -> str | None:
    """Return in words where an address holds a secret; None if it holds none, or only names in braces."""
    parts = urlsplit(url)
    login, at, _ = parts.netloc.rpartition("@")
    if at and not _is_named(login):
        return "a user name or password"
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        if value and _SECRET_NAME.search(name) and not _is_named(value):
            return f"a value for {name}"
    return None


def filled_in(url: str, field: str) -> str:
    """Return the address with the environment's values in place of names in braces.

    Args:
        url: the configured address.
        field: the field that holds it, for the message.

    Raises:
        D3POError: the environment has no such name, or its value is empty.
    """
    for name in _names(url):
        if not os.environ.get(name):
            raise D3POError(
                f"{field} is {url!r}, and {name} is not set in the environment; type `export {name}=...` where the run "
                "starts (for a worker: before `d3po up`)"
            )
    return NAMED.sub(lambda found: quote(os.environ[found[1]], safe=":"), url)


def _names(url: str) -> Iterator[str]:
    return (found[1] for found in NAMED.finditer(url))


def without_login(url: str) -> str:
    """Return an address that identifies a server, without login, query and trailing slash."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path.rstrip("/"), "", ""))
