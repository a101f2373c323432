"""Who may judge a campaign, how much, and which groups: the file ``invitations.json`` in the campaign's folder.

A campaign without the file is open to everybody with a rater's link. The first invitation closes it to all others. The
file holds no links, so it may be copied with the campaign. The page and the commands share it.
"""

import contextlib
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from d3po_core.errors import D3POError
from d3po_core.people.rater_names import name_problem
from d3po_core.store.files import atomic_path, exclusive

FILE = "invitations.json"
MAX_QUOTA = 1_000_000
Assignment = Literal["any", "split"]


class Invitation(BaseModel):
    """One rater's invitation; ``quota`` is the most groups per round, ``revoked`` when it ended (UTC)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    quota: Annotated[int | None, Field(ge=1, le=MAX_QUOTA)] = None
    revoked: str | None = None


class Invitations(BaseModel):
    """All invitations to a campaign.

    Attributes:
        closed: whether only invited raters may judge; true from the first invitation on.
        assignment: ``any``: everybody may judge every group. ``split``: groups are dealt out to the invited raters.
        raters: invitations by name, also those that were revoked.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    closed: bool = False
    assignment: Assignment = "any"
    raters: dict[str, Invitation] = {}

    @property
    def standing(self) -> dict[str, Invitation]:
        """The invitations that were not revoked, by name."""
        return {name: one for name, one in sorted(self.raters.items()) if one.revoked is None}

    def quota(self, rater: str) -> int | None:
        """The most groups per round that a rater judges, None for no limit."""
        return self.raters.get(rater, Invitation()).quota


OPEN = Invitations()


def read_invitations(campaign: Path) -> Invitations:
    """A campaign's invitations; without the file there are none, and the campaign is open.

    Raises:
        D3POError: the file cannot be read. Nobody may judge then, rather than everybody.
    """
    path = campaign / FILE
    try:
        return Invitations.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return OPEN
    except (OSError, ValidationError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not what d3po invite wrote"
        raise D3POError(
            f"{path} cannot be read ({reason}); restore it, or remove it and invite everybody again"
        ) from None


def invite(campaign: Path, rater: str, quota: int | None = None) -> Invitations:
    """Invite a rater, or renew a revoked invitation.

    Args:
        campaign: the campaign's folder.
        rater: the name.
        quota: the most groups per round; 0 removes the limit, and None leaves it as it is.

    Raises:
        D3POError: the name or the quota is not valid, or the file cannot be written.
    """
    if problem := name_problem(rater):
        raise D3POError(f"rater {rater!r}: {problem}; invite somebody of such a name")
    with _changing(campaign) as known:
        earlier = known.raters.get(rater, Invitation())
        kept = earlier.quota if quota is None else _checked_quota(rater, quota)
        return _written(campaign, known, {rater: Invitation(quota=kept)}, closed=True)


def revoke(campaign: Path, rater: str) -> Invitations:
    """Note that a rater may no longer judge the campaign; what the rater said stays.

    Raises:
        D3POError: the file cannot be written.
    """
    with _changing(campaign) as known:
        earlier = known.raters.get(rater, Invitation())
        now = datetime.now(UTC).isoformat(timespec="seconds")
        ended = earlier if earlier.revoked else earlier.model_copy(update={"revoked": now})
        return _written(campaign, known, {rater: ended})


def set_quota(campaign: Path, rater: str, quota: int) -> Invitations:
    """Set the most groups per round of an invited rater; 0 removes the limit.

    Raises:
        D3POError: the rater is not invited, the quota is not valid, or the file cannot be written.
    """
    with _changing(campaign) as known:
        if rater not in known.standing:
            raise D3POError(
                f"rater {rater!r} is not invited to campaign {campaign.name!r}, so there is no quota to set; "
                "invite them first"
            )
        now = Invitation(quota=_checked_quota(rater, quota))
        return _written(campaign, known, {rater: now})


def set_assignment(campaign: Path, assignment: Assignment) -> Invitations:
    """Say how groups reach raters: ``any`` or ``split``.

    Raises:
        D3POError: nobody is invited, so there is nobody to split among; or the file cannot be written.
    """
    with _changing(campaign) as known:
        if assignment == "split" and not known.standing:
            raise D3POError(
                f"nobody is invited to campaign {campaign.name!r}, so its groups cannot be split among raters; "
                f"type first: d3po invite NAME --campaign {campaign.name}"
            )
        return _written(campaign, known, {}, assignment=assignment)


@contextlib.contextmanager
def _changing(campaign: Path) -> Iterator[Invitations]:
    with exclusive(campaign / f".{FILE}.lock", mode=0o600):
        yield read_invitations(campaign)


def _written(campaign: Path, known: Invitations, raters: dict[str, Invitation], **changed: Any) -> Invitations:
    now = known.model_copy(update={**changed, "raters": {**known.raters, **raters}})
    if now != known:
        with atomic_path(campaign / FILE, private=True) as temporary:
            temporary.unlink(missing_ok=True)
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
                stream.write(now.model_dump_json(indent=1))
    return now


def _checked_quota(rater: str, quota: int) -> int | None:
    if not 0 <= quota <= MAX_QUOTA:
        raise D3POError(
            f"quota {quota} of rater {rater!r}: expected a number of groups per round, 1 to {MAX_QUOTA}, "
            "or 0 for no limit"
        )
    return quota or None
