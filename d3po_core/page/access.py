"""Control who may judge what: one token per rater's name and one of the owner, in a file that only its owner can read.

A rater who got a link from ``d3po label`` may judge every campaign that is open to all. A rater whose link came with an
invitation, a guest, may judge only the campaigns of the invitations.
"""

import contextlib
import hashlib
import hmac
import os
import secrets
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from d3po_core.errors import D3POError
from d3po_core.people.invitations import invite, read_invitations, revoke
from d3po_core.people.rater_names import name_problem
from d3po_core.store.files import disk_errors, exclusive

RATERS_FILE = "raters.json"

# A short secret would let anybody in, and an empty one even those without a cookie.
_Secret = Annotated[str, Field(min_length=32, max_length=256, pattern=r"^[A-Za-z0-9_-]+$")]


class _File(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    secret: Annotated[str, Field(pattern=r"^([0-9a-f]{2}){16,64}$")]
    raters: dict[str, _Secret]
    owner: _Secret | None = None
    guests: list[str] = []


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

    def token(self, rater: str, guest: bool = False) -> str:
        """A rater's token, created for a new name.

        Args:
            rater: the name.
            guest: admit a new rater only to the campaigns of invitations.

        Raises:
            D3POError: the name is not valid, or the file cannot be written.
        """
        if problem := name_problem(rater):
            raise D3POError(f"rater {rater!r}: {problem}; give --rater such a name")
        with self._changing() as values:
            if rater not in values.raters:
                values.raters[rater] = secrets.token_urlsafe(32)
                values.guests += [rater] if guest else []
            return values.raters[rater]

    def owner_token(self) -> str:
        """The owner's token, created at the first call.

        Raises:
            D3POError: the file cannot be written.
        """
        with self._changing() as values:
            values.owner = values.owner or secrets.token_urlsafe(32)
            return values.owner

    def invite(self, campaign: Path, rater: str, quota: int | None = None) -> str:
        """Invite a rater to a campaign and return the rater's token; see ``invitations.invite``.

        Raises:
            D3POError: the name or the quota is not valid, or a file cannot be written.
        """
        invite(campaign, rater, quota)
        return self.token(rater, guest=True)

    def revoke(self, campaign: Path, rater: str) -> bool:
        """End a rater's link at once and note it in the campaign; return whether there was a link.

        Raises:
            D3POError: nobody of that name has a link or an invitation, or a file cannot be written.
        """
        if rater not in {*self.names(), *read_invitations(campaign).raters}:
            known = ", ".join(self.names()) or "nobody"
            raise D3POError(f"rater {rater!r} has no link; those who have one: {known}")
        with self._changing() as values:
            values.guests = [name for name in values.guests if name != rater]
            found = values.raters.pop(rater, None) is not None
        revoke(campaign, rater)
        return found

    def admits(self, rater: str, campaign: Path) -> bool:
        """Return whether the rater, who has a link, may judge a campaign.

        Raises:
            D3POError: the campaign's invitations cannot be read.
        """
        invitations = read_invitations(campaign)
        if rater in invitations.raters:
            return rater in invitations.standing
        return not invitations.closed and rater not in self._read().guests

    def admitted(self, campaign: Path) -> list[str]:
        """Raters who have a link and may judge a campaign, by name.

        Raises:
            D3POError: the campaign's invitations cannot be read.
        """
        return [name for name in self.names() if self.admits(name, campaign)]

    def is_owner(self, token: str) -> bool:
        """Return whether this is the owner's token; a wrong one takes as long as the right one."""
        owner = self._read().owner
        return owner is not None and hmac.compare_digest(owner.encode(), token.encode(errors="replace"))

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

    @contextlib.contextmanager
    def _changing(self) -> Iterator[_File]:
        """The file's values, alone; what the block changes in them is written."""
        with exclusive(self.path.with_name(f".{self.path.name}.lock"), mode=0o600):
            values = self._read()
            changed = values.model_copy(deep=True)
            yield changed
            if changed != values:
                self._write(changed)

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
