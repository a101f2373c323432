"""Campaigns in Python: ``d3po.open("shapes").rounds``; and the installed name of the folders ``flows`` and ``tasks``.

``d3po.flows`` and ``d3po.tasks`` are links to the folders beside this one. A wheel installs them under this name, so
they cannot collide with another project's top-level ``flows`` or ``tasks``.
"""

import os
from typing import TYPE_CHECKING

from d3po_core.errors import D3POError

if TYPE_CHECKING:
    import pandas as pd

    from d3po.campaign import Campaign

__all__ = ["D3POError", "campaigns", "open"]


def open(name: "str | os.PathLike[str]") -> "Campaign":
    """Return a campaign to read.

    Args:
        name: its name, the path of its folder if that lies outside the data folder, or the address of its mirror.

    Raises:
        D3POError: there is no such campaign; the message lists those that exist.
    """
    from d3po.campaign import Campaign

    if not isinstance(name, str | os.PathLike):
        raise D3POError(f"d3po.open({name!r}): expected a campaign's name or folder, such as d3po.open('shapes')")
    return Campaign(os.fspath(name))


def campaigns() -> "pd.DataFrame":
    """Return one row per campaign of the data folder, indexed by name: rounds, scores, champion, size, problem."""
    import pandas as pd

    from d3po_core.report.campaigns import campaign_states

    rows = []
    for state in campaign_states():
        scores = {"base": state.base, "score": state.score, "best": state.best}
        rows.append(vars(state) | {name: score and score.mean for name, score in scores.items()})
    return pd.DataFrame(rows, columns=_COLUMNS).set_index("name")


_COLUMNS = [
    "name", "rounds", "scorer", "base", "score", "champion", "best", "waits_for", "megabytes", "changed", "problem"
]  # fmt: skip
