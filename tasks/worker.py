"""The worker of ``d3po up``: Prefect's process worker without its second report of a crash.

``python -m d3po.tasks.worker`` takes the arguments of ``prefect``. Prefect's runner reports a killed process at once.
Up to a minute later the worker reports it again, once it has imported the flow to look for hooks. A run retried in
between would then be Crashed while it waits to start. Another server may use Prefect's own worker; there only
``d3po.tasks.alive`` helps.
"""

import warnings
from typing import Any

from prefect.workers.process import ProcessWorker

SECOND_REPORT = "Flow run infrastructure exited with non-zero status code"

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # our class replaces Prefect's worker of this type

    class Worker(ProcessWorker):
        """A process worker that skips the report that only repeats the runner's."""

        type = "process"

        async def _propose_crashed_state(self, flow_run: Any, message: str, client: Any = None) -> None:
            if not message.startswith(SECOND_REPORT):
                await super()._propose_crashed_state(flow_run, message, client)


if __name__ == "__main__":
    from prefect.cli import app

    app()
