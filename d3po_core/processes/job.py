"""The computing part of a round's stages: a job is a function that one or several processes run.

    job(config, round_number, tell) -> result

Each rank calls ``tell`` with the number of units that it has done. The result must fit into JSON; the first rank's is
used. When a job returns, its output is on disk. Ranks share a job's work by the rules of ``d3po_core.processes.ranks``.
A job that was stopped anywhere and runs again ends as if it had not been stopped.
"""

from collections.abc import Callable
from typing import Any

from d3po_core.config import CampaignConfig

Tell = Callable[[int], None]
Job = Callable[[CampaignConfig, int, Tell], Any]
