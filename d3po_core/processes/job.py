"""The computing part of a round's stages: a job is a function that one process runs, or several together.

    job(config, round_number, tell) -> result

``tell`` is called with the number of units that were done, by each rank for its own; the result is what JSON can hold,
and the first rank's counts. What a job computes is on disk when it returns. Ranks that run one job share its work by
the rules of ``d3po_core.processes.ranks``; a job that was stopped anywhere and is run again ends as one that was not.
"""

from collections.abc import Callable
from typing import Any

from d3po_core.config import CampaignConfig

Tell = Callable[[int], None]
Job = Callable[[CampaignConfig, int, Tell], Any]
