"""Campaigns in Python: ``d3po.open("shapes").rounds``; and the installed name of the folders ``flows`` and ``tasks``.

``d3po.flows`` and ``d3po.tasks`` are links to the folders beside this one. A wheel installs them under this name, so
they cannot collide with another project's top-level ``flows`` or ``tasks``.
"""

from typing import TYPE_CHECKING

from d3po_core.errors import D3POError

if TYPE_CHECKING:
    import pandas as pd

    from d3po.campaign import Campaign

__all__ = ["D3POError", "campaigns", "open"]


def open(name: str) -> "Campaign":
    """Return a campaign to read.

    Args:
        name: its name, or the path of its folder if that lies outside the data folder.

    Raises:
        D3POError: there is no such campaign; the message lists those that exist.
    """
    from d3po.campaign import Campaign

    return Campaign(name)


def campaigns() -> "pd.DataFrame":
    """Return one row per campaign of the data folder, indexed by name: rounds, images, scores, champion, problem."""
    import pandas as pd

    from d3po_core.paths import data_folder
    from d3po_core.queries.campaigns import campaign_summaries

    rows = []
    for one in campaign_summaries(data_folder() / "runs"):
        scores = {when: score and score.mean for when, score in (("first", one.first), ("last", one.last))}
        rows.append(vars(one) | scores | {"best": one.best and one.best.mean})
    return pd.DataFrame(rows, columns=["name", *_COLUMNS]).set_index("name")


_COLUMNS = (
    "rounds", "num_images", "scorer", "first", "last", "best", "champion", "waiting", "changed_at", "problem"
)  # fmt: skip
