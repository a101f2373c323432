"""What a process that runs rounds imports sooner or later, imported once for all that are forked. Not a test by itself.

Only imports: a process that has computed, or that has started a thread, must not be forked.
"""

# ruff: noqa: F401

import matplotlib.backends.backend_svg
import matplotlib.figure
import mlflow.entities
import mlflow.store.artifact.local_artifact_repo
import mlflow.store.model_registry.sqlalchemy_store
import mlflow.store.tracking.sqlalchemy_store
import peft
import scipy.stats

import d3po.flows.round
import d3po_core.report.write
import tests.flows.rounds_in_processes
