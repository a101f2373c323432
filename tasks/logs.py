"""The log that tasks write to: the run's own, which Prefect's page shows."""

import logging

from prefect import get_run_logger
from prefect.context import FlowRunContext
from prefect.exceptions import MissingContextError
from prefect.logging.loggers import flow_run_logger


def run_logger() -> logging.Logger | logging.LoggerAdapter[logging.Logger]:
    """The run's own logger; outside a run, this module's."""
    try:
        return get_run_logger()
    except MissingContextError:
        return logging.getLogger(__name__)


def flow_logger() -> logging.Logger | logging.LoggerAdapter[logging.Logger]:
    """The flow run's logger, also in a task, whose own log ``d3po run`` does not show; outside a run, this module's."""
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        return logging.getLogger(__name__)
    return flow_run_logger(context.flow_run, context.flow)
