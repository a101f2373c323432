"""Control who may judge: one token per rater's name, in a file that only its owner can read."""

import hashlib
import hmac
import os
import secrets
import threading
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from d3po_core.errors import D3POError
from d3po_core.people.rater_names import name_problem
from d3po_core.store.files import disk_errors, exclusive

RATERS_FILE = "raters.json"

# A short secret would let anybody in, and an empty one even those without a cookie.
_Secret = Annotated[str, Field(min_length=32, max_length=256, pattern=r"^[A-Za-z0-9_-]+$")]


class _File(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    secret: Annotated[str, Field(pattern=r"^([0-9a-f]{2}){16,64}$")]
    raters: dict[str, _Secret]


class AccessError(D3POError):
    """The raters' file cannot be used, so nobody can be let in; the message names the file."""


class Raters:
    """The raters' tokens; a rater that another process adds is known at once.

    Args:
        data: the data folder.
    """

    def __init__(self, data: Path) -> None:
        self.path = data / RATERS_FILE
        self._lock = threading.Lock()
        self._stamp: tuple[int, int] | None = None
        self._values = _File(secret=secrets.token_hex(32), raters={})

    def token(self, rater: str) -> str:
        """A rater's token, created for a new name.

        Raises:
            D3POError: the name is not valid, or the file cannot be written.
        """
        if problem := name_problem(rater):
            raise D3POError(f"rater {rater!r}: {problem}; give --rater such a name")
        with exclusive(self.path.with_name(f".{self.path.name}.lock"), mode=0o600):
            values = self._read()
            if rater not in values.raters:
                values.raters[rater] = secrets.token_urlsafe(32)
                self._write(values)
            return values.raters[rater]

    def names(self) -> list[str]:
        """All raters, by name."""
        return sorted(self._read().raters)

    def rater_of(self, token: str) -> str | None:
        """The rater with this token, None if wrong; a wrong token takes as long as a right one."""
        found = None
        for rater, known in self._read().raters.items():
            if hmac.compare_digest(known.encode(), token.encode(errors="replace")):
                found = rater
        return found

    def opaque(self, *parts: str) -> str:
        """A name that reveals nothing about the parts, and stays the same after a restart."""
        key = bytes.fromhex(self._read().secret)
        return hashlib.blake2b("\x1f".join(parts).encode(), key=key, digest_size=16).hexdigest()

    def _read(self) -> _File:
        with self._lock:
            try:
                status = self.path.stat()
                if status.st_mode & 0o077:
                    raise AccessError(f"{self.path} can be read by others; type: chmod 600 {self.path}")
                if (status.st_mtime_ns, status.st_ino) != self._stamp:
                    self._values = _File.model_validate_json(self.path.read_bytes())
                    self._stamp = (status.st_mtime_ns, status.st_ino)
            except (FileNotFoundError, NotADirectoryError):
                self._values, self._stamp = _File(secret=secrets.token_hex(32), raters={}), None
            except (OSError, ValidationError) as error:
                reason = error.strerror if isinstance(error, OSError) else "it is not what d3po label wrote"
                raise AccessError(
                    f"{self.path} cannot be read ({reason}); restore it, or remove it and give out new links"
                ) from None
            return self._values

    def _write(self, values: _File) -> None:
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        with disk_errors(self.path):
            temporary.unlink(missing_ok=True)
            # Private from its first byte, not only once it is complete.
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
                stream.write(values.model_dump_json(indent=1))
            os.replace(temporary, self.path)
