"""Errors that a user can cause and mend; their message is one line that says what to do. And one that trying mends."""


class D3POError(ValueError):
    """Something the user can mend: what was found, what was expected, where, and what to do next."""


class CampaignBusyError(D3POError):
    """Another process is advancing the same campaign."""


class NonFiniteLossError(D3POError):
    """Training produced a non-finite number; the last good checkpoint is kept."""


class RankError(RuntimeError):
    """One of several processes died, failed or computed something else than the others: worth trying again."""
