"""The objects of one campaign in a store: create, read, list, delete; every failure is one line.

The library obstore reaches S3, Google Cloud, Azure and folders. It is imported only when a mirror is opened.
"""

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from d3po_core.errors import D3POError
from d3po_core.mirror.told import in_words, names_no_bucket
from d3po_core.urls import inline_secret, masked

SCHEMES = ("s3", "gs", "az", "file")
# Larger files go up in parts. Their names hold their content's digest, so writing one twice changes nothing.
IN_PARTS = 8 << 20

T = TypeVar("T")


class MirrorAwayError(D3POError):
    """The store cannot be used now; what is missing there is delivered later."""


class Listed(NamedTuple):
    """An object: its name, its size in bytes, and the store's own time of writing."""

    name: str
    bytes: int
    modified: datetime


class Objects:
    """The objects below one prefix of a store; it counts requests and bytes.

    Args:
        store: the opened store.
        url: its address, for messages.
        prefix: the campaign's name; empty for the store's top.
    """

    def __init__(self, store: Any, url: str, prefix: str = "") -> None:
        self._store, self.url, self._prefix = store, url, f"{prefix}/" if prefix else ""
        self.requests: Counter[str] = Counter()
        self.bytes_sent = self.bytes_received = 0

    @property
    def shown(self) -> str:
        """Return the address for a person, without secrets."""
        return masked(f"{self.url.rstrip('/')}/{self._prefix.rstrip('/')}".rstrip("/"))

    def create(self, name: str, content: bytes) -> bool:
        """Write an object that nobody wrote yet; return False, and change nothing, if it exists.

        Raises:
            MirrorAwayError: the store did not take it.
        """
        import obstore
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        self._count("put", sent=len(content))
        with self._errors():
            try:
                obstore.put(self._store, self._prefix + name, content, mode="create", use_multipart=False)
            except (AlreadyExistsError, PreconditionError):
                return False
        return True

    def create_file(self, name: str, path: Path) -> bool:
        """Write a file under a name that holds its content's digest; return False if it is there already.

        Raises:
            MirrorAwayError: the store did not take it; no half object is left.
        """
        import obstore

        size = path.stat().st_size
        if size <= IN_PARTS:
            return self.create(name, path.read_bytes())
        if self.size(name) == size:
            return False
        self._count("put", times=2 + -(-size // IN_PARTS), sent=size)
        with self._errors():
            obstore.put(self._store, self._prefix + name, path, use_multipart=True, chunk_size=IN_PARTS)
        return True

    def get(self, name: str) -> bytes | None:
        """Return an object's content, None if there is none of that name.

        Raises:
            MirrorAwayError: the store does not answer.
        """
        import obstore

        self._count("get")
        with self._errors():
            content = _if_there(lambda: bytes(obstore.get(self._store, self._prefix + name).bytes()))
        if content is None:
            return None
        self.bytes_received += len(content)
        return content

    def fetch(self, name: str, path: Path) -> bool:
        """Write an object's content to a file in pieces; return False if there is none of that name.

        Raises:
            MirrorAwayError: the store does not answer, or stops in the middle.
        """
        import obstore

        self._count("get")
        with self._errors():
            stream = _if_there(lambda: obstore.get(self._store, self._prefix + name).stream(min_chunk_size=IN_PARTS))
            if stream is None:
                return False
            with path.open("wb") as file:
                for piece in stream:
                    self.bytes_received += len(piece)
                    file.write(bytes(piece))
        return True

    def size(self, name: str) -> int | None:
        """Return an object's size in bytes, None if there is none of that name."""
        found = self._head(name)
        return None if found is None else int(found["size"])

    def modified(self, name: str) -> datetime | None:
        """Return the store's own time of an object's writing, None if there is none of that name."""
        found = self._head(name)
        return None if found is None else found["last_modified"]

    def listed(self, folder: str) -> list[Listed]:
        """Return the objects in a folder and below it, sorted by name.

        Raises:
            MirrorAwayError: the store does not answer.
        """
        import obstore

        found = []
        with self._errors():
            for page in obstore.list(self._store, (self._prefix + folder).rstrip("/") or None, chunk_size=1000):
                self._count("list")
                found += [Listed(o["path"].removeprefix(self._prefix), o["size"], o["last_modified"]) for o in page]
        self._count("list", times=0 if found else 1)
        return sorted(found)

    def delete(self, name: str) -> None:
        """Delete an object; it is fine if it is gone."""
        import obstore

        self._count("delete")
        with self._errors(), contextlib.suppress(FileNotFoundError):
            obstore.delete(self._store, self._prefix + name)

    def _head(self, name: str) -> Any:
        import obstore

        self._count("head")
        with self._errors():
            return _if_there(lambda: obstore.head(self._store, self._prefix + name))

    def _count(self, kind: str, times: int = 1, sent: int = 0) -> None:
        self.requests[kind] += times
        self.bytes_sent += sent

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        from obstore.exceptions import BaseError

        try:
            yield
        except (BaseError, OSError) as error:
            raise MirrorAwayError(f"the mirror {self.shown} {in_words(error, urlsplit(self.url).scheme)}") from None


def _if_there(ask: Callable[[], T]) -> T | None:
    """Return what the store answers, None if it has no object of that name; a missing bucket stays an error."""
    try:
        return ask()
    except FileNotFoundError as error:
        if names_no_bucket(str(error)):
            raise
        return None


def open_objects(url: str, campaign: str = "", timeout_seconds: float = 10.0) -> Objects:
    """Return the objects of a campaign in the store at an address; nothing is asked of the store yet.

    Args:
        url: s3://, gs://, az:// or file://, with a prefix or without.
        campaign: the campaign's name.
        timeout_seconds: the longest wait for one request; it is tried twice.

    Raises:
        D3POError: the address is none, the extra ``mirror`` is not installed, or a folder does not exist.
    """
    check_url(url)
    try:
        from obstore.store import LocalStore, from_url
    except ImportError:
        raise D3POError(
            f"store.mirror is {masked(url)!r} and obstore is not installed; type: pip install 'd3po[mirror]'"
        ) from None
    from obstore.exceptions import BaseError

    path = Path(urlsplit(url).path)
    if url.startswith("file:"):
        if not path.is_dir():
            raise MirrorAwayError(f"the mirror {url} is no folder; mount it, or make it: mkdir -p {path}")
        return Objects(LocalStore(path), url, campaign)
    limits = {"timeout": f"{timeout_seconds}s", "connect_timeout": f"{min(5.0, timeout_seconds)}s"}
    plain = any(os.environ.get(name, "").startswith("http://") for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT"))
    retries = {"max_retries": 1, "retry_timeout": timedelta(seconds=2 * timeout_seconds)}
    options: Any = {**limits, "allow_http": plain}
    open_store: Any = from_url
    try:
        return Objects(open_store(url, client_options=options, retry_config=retries), url, campaign)
    except (BaseError, ValueError) as error:
        said = in_words(error, urlsplit(url).scheme)
        raise D3POError(f"store.mirror is {masked(url)!r}, which {said}") from None


def check_url(url: str) -> None:
    """Refuse an address that is no mirror's.

    Raises:
        D3POError: its scheme is unknown, it names no bucket, or it holds a secret.
    """
    parts = urlsplit(url)
    named = Path(parts.path).is_absolute() and not parts.netloc if parts.scheme == "file" else bool(parts.netloc)
    if parts.scheme not in SCHEMES or not named:
        raise D3POError(
            f"store.mirror is {masked(url)!r}; expected s3://BUCKET/PREFIX, gs://..., az://... or file:///FOLDER"
        )
    if secret := inline_secret(url):
        raise D3POError(f"store.mirror holds {secret}; leave it out, and set the store's environment variables instead")
