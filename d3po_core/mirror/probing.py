"""Test a store before it is trusted: ask for its time, and check that it refuses to overwrite an object."""

import uuid
from datetime import UTC, datetime

from d3po_core.errors import D3POError
from d3po_core.mirror.objects import Objects


def store_time(objects: Objects) -> datetime:
    """Return the store's clock: the time of an object that is written now."""
    probe = _probe()
    objects.create(probe, b"what time is it")
    modified = objects.modified(probe)
    objects.delete(probe)
    return modified or datetime.now(UTC)


def require_conditions(objects: Objects) -> None:
    """Check that the store refuses to create an object that exists: on this the lease rests.

    Raises:
        MirrorAwayError: the store does not answer.
        D3POError: it overwrites the object.
    """
    probe = _probe()
    objects.create(probe, b"to be kept")
    overwritten = objects.create(probe, b"to be refused")
    objects.delete(probe)
    if overwritten:
        raise D3POError(
            f"the mirror {objects.shown} overwrites an object that it was told to keep (a conditional put), so two "
            "machines could write one campaign there; use a store that honours If-None-Match, or a newer version of it"
        )


def _probe() -> str:
    return f"clock/{uuid.uuid4().hex}"
