"""The state of a run that was refused because a person has to change something first."""

from prefect.states import Cancelled, State

REFUSED = "Refused"


def refused(message: str) -> State:
    """Return the state of a run that ends before it computed anything, because of a mistake in what it was given.

    It counts as cancelled, not as failed, so that a typo neither fills the list of failures nor sets off automations.
    A retry is possible, as after any end.
    """
    return Cancelled(name=REFUSED, message=message)
