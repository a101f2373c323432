"""Addresses that may hold secrets: what is shown of them, and where secrets belong."""

import os
import re
from collections.abc import Iterator
from urllib.parse import parse_qsl, quote, urlsplit, urlunsplit

from d3po_core.errors import D3POError

HIDDEN = "***"
# A name of the environment in braces: what is written down is the name, what is sent is its value.
NAMED = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_SECRET_WORDS = ("key", "token", "secret", "passw", "pwd", "auth", "sig", "credential", "session", "code")
_SECRET_NAME = re.compile("|".join(_SECRET_WORDS), re.IGNORECASE)
_LOGIN = re.compile(r"(?<=://)[^/?#\s'\"]*@")
_QUERY = re.compile(r"([?&;])([^=&;#\s'\"]+)=([^&;#\s'\"]*)")


def schema_pattern() -> str:
    """What JSON Schema can say of an address without an inline secret: Prefect then refuses it before it is stored."""
    words = "|".join("".join(f"[{letter.upper()}{letter}]" for letter in word) for word in _SECRET_WORDS)
    name = r"\$\{[A-Za-z_][A-Za-z0-9_]*\}"
    login = rf"(?!https?://(?!({name}:?)+@)[^/?#]*@)"
    query = rf"(?!https?://[^#]*[?&;][^=&;#]*({words})[^=&;#]*=(?!({name})+([&;#]|$))[^&;#])"
    return f"^{login}{query}"


def masked(text: str) -> str:
    """A text in which every address has neither its login nor the values of its query.

    Names in braces, which stand for the environment, are no secrets and stay.
    """

    def login(found: re.Match[str]) -> str:
        return found[0] if _is_named(found[0][:-1]) else f"{HIDDEN}@"

    def value(found: re.Match[str]) -> str:
        secret = found[3] and _SECRET_NAME.search(found[2]) and not _is_named(found[3])
        return f"{found[1]}{found[2]}={HIDDEN if secret else found[3]}"

    return _QUERY.sub(value, _LOGIN.sub(login, text)) if "://" in text else text


def _is_named(text: str) -> bool:
    """Whether nothing is left of a text but names of the environment and what separates them."""
    return not NAMED.sub("", text).strip(":")


def inline_secret(url: str) -> str | None:
    """Where an address holds a secret itself, in words; None when it holds none, or only names of the environment."""
    parts = urlsplit(url)
    login, at, _ = parts.netloc.rpartition("@")
    if at and not _is_named(login):
        return "a user name or password"
    for name, value in parse_qsl(parts.query, keep_blank_values=True):
        if value and _SECRET_NAME.search(name) and not _is_named(value):
            return f"a value for {name}"
    return None


def filled_in(url: str, field: str) -> str:
    """The address with the environment's values in place of names in braces.

    Args:
        url: as it was configured.
        field: where, for the message.

    Raises:
        D3POError: the environment has no such name.
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
    """An address as identity of a server: without login, query and trailing slash."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path.rstrip("/"), "", ""))
