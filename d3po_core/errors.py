"""Errors that the user can fix (``D3POError``), and one that a retry may fix (``RankError``)."""


class D3POError(ValueError):
    """The user can fix this; the message says what was found and expected, where, and what to do next."""


class CampaignBusyError(D3POError):
    """Another process is advancing the same campaign."""


class NonFiniteLossError(D3POError):
    """Training produced a non-finite number; the last good checkpoint is kept."""


class RankError(RuntimeError):
    """One of several processes died, failed or disagreed with the others; a retry may succeed."""
