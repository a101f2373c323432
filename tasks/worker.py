"""The worker of ``d3po up``: Prefect's process worker without its second report of a crash.

``python -m tasks.worker`` takes the words of ``prefect``. Prefect's runner reports a killed process as soon as it is
gone. The worker reports the same again once it has imported the flow to look for hooks, up to a minute later: a run
that was retried in between would be Crashed while it waits to start. A worker of another server is Prefect's own; there
``tasks.alive`` is all that helps.
"""

import warnings
from typing import Any

from prefect.workers.process import ProcessWorker

SECOND_REPORT = "Flow run infrastructure exited with non-zero status code"

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it takes the place of the worker of this type

    class Worker(ProcessWorker):
        """Leaves out the report that only repeats the runner's."""

        type = "process"

        async def _propose_crashed_state(self, flow_run: Any, message: str, client: Any = None) -> None:
            if not message.startswith(SECOND_REPORT):
                await super()._propose_crashed_state(flow_run, message, client)


if __name__ == "__main__":
    from prefect.cli import app

    app()
