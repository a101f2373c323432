"""MLflow's models: one per checkpoint, one version each of the campaign's registered model, and its aliases.

Like ``store``, this module may import mlflow, and repeating a call changes nothing.
"""

import json
from collections.abc import Collection
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from d3po.tasks.tracking.store import NOTE, Client, campaign_run_id, experiment, milliseconds, round_run_id, rounded
from d3po_core.config import CampaignConfig

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel

FEW = 100  # runs that a query of MLflow may name


def log_checkpoint(
    client: Client, config: CampaignConfig, round_number: int, run_id: str, name: str, folder: Path,
    tags: dict[str, str], metrics: dict[str, float | None], when: datetime,
) -> "LoggedModel":  # fmt: skip
    """Log a checkpoint as a model of its run, with its held-out metrics, unless it is there.

    Args:
        client: of the store.
        config: of the campaign.
        round_number: the checkpoint's round.
        run_id: the round's run.
        name: of the model; MLflow refuses / : . % and quotes in it.
        folder: holds only the weights, because all of it is uploaded.
        tags: of the model.
        metrics: of the model; MLflow sorts models by them.
        when: time of the metrics.
    """
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus

    model = _logged_model(client, run_id)
    if model is None or model.status != LoggedModelStatus.READY:
        model = client.create_logged_model(
            experiment(client), name=name, source_run_id=run_id, tags=tags, model_type=config.model.train
        )
        client.log_model_artifacts(model.model_id, str(folder))
        _log_model_metrics(client, model, round_number, run_id, metrics, when)
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, round_number)])
        model = client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    return model


def log_to_model(
    client: Client, round_number: int, run_id: str, metrics: dict[str, float | None], when: datetime
) -> None:
    """Add metrics to the model of a round's checkpoint, if it was logged."""
    if (model := _logged_model(client, run_id)) is not None:
        _log_model_metrics(client, model, round_number, run_id, metrics, when)


def _logged_model(client: Client, run_id: str) -> "LoggedModel | None":
    return next(iter(client.search_logged_models([experiment(client)], f"source_run_id = '{run_id}'")), None)


def _log_model_metrics(
    client: Client, model: "LoggedModel", round_number: int, run_id: str, metrics: dict[str, float | None],
    when: datetime,
) -> None:  # fmt: skip
    from mlflow.entities import Metric

    values = [
        Metric(name, rounded(value), milliseconds(when), round_number, model_id=model.model_id)
        for name, value in metrics.items() if value is not None
    ]  # fmt: skip
    client.log_batch(run_id, metrics=values)


def register_version(client: Client, config: CampaignConfig, model: "LoggedModel", tags: dict[str, str]) -> str:
    """The version of the campaign's registered model for this checkpoint; created if missing."""
    from mlflow.exceptions import MlflowException

    name = registered_name(config)
    try:
        client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        client.create_registered_model(name)
        for earlier in _earlier_models(client, config, model):  # somebody deleted the registered model
            _register(client, name, earlier, {**earlier.tags})
    present = client.search_model_versions(f"name = '{name}' and run_id = '{model.source_run_id}'")
    return str(present[0].version) if present else _register(client, name, model, tags)


def _register(client: Client, name: str, model: "LoggedModel", tags: dict[str, str]) -> str:
    own = {key: value for key, value in tags.items() if not key.startswith("mlflow.")}
    made = client.create_model_version(
        name, source=f"models:/{model.model_id}", run_id=str(model.source_run_id), tags=own, model_id=model.model_id
    )
    version = str(made.version)
    # MLflow's page of the model then links to the version.
    linked = {"mlflow.modelVersions": json.dumps([{"name": name, "version": version}])}
    client.set_logged_model_tags(model.model_id, linked)
    return version


def _earlier_models(client: Client, config: CampaignConfig, model: "LoggedModel") -> list["LoggedModel"]:
    """The campaign's other checkpoints in MLflow, in order of rounds."""
    wanted = f"tags.`mlflow.parentRunId` = '{campaign_run_id(config)}'"
    rounds = client.search_runs([experiment(client)], wanted, max_results=10_000)
    in_order = sorted(rounds, key=lambda run: int(run.data.tags["d3po.round"]))
    found = [_logged_model(client, run.info.run_id) for run in in_order if run.info.run_id != model.source_run_id]
    return [earlier for earlier in found if earlier is not None]


def versions_of(client: Client, config: CampaignConfig, runs: Collection[str]) -> dict[str, str]:
    """The versions of the campaign's registered model that came from these runs, by the run's id."""
    wanted = f"name = '{registered_name(config)}'"
    if len(runs) <= FEW:  # a long campaign has a version per round
        wanted += f" and run_id IN ({', '.join(map(repr, runs))})"
    found = client.search_model_versions(wanted)
    return {str(version.run_id): str(version.version) for version in found}


def describe_version(client: Client, config: CampaignConfig, run_id: str, version: str, text: str) -> None:
    """Set the description of a version and of the model it came from."""
    client.update_model_version(registered_name(config), version, description=text)
    if (model := _logged_model(client, run_id)) is not None:
        client.set_logged_model_tags(model.model_id, {NOTE: text})


def describe_registered(client: Client, config: CampaignConfig, text: str, tags: dict[str, str]) -> None:
    """Set the registered model's description and tags, if it exists."""
    name = registered_name(config)
    if client.search_registered_models(f"name = '{name}'"):
        client.update_registered_model(name, text)
        for key, value in tags.items():
            client.set_registered_model_tag(name, key, value)


def set_aliases(client: Client, config: CampaignConfig, rounds: dict[str, int]) -> None:
    """Point the registered model's aliases to these rounds' versions; remove aliases of rounds without one."""
    name, runs = registered_name(config), {number: round_run_id(config, number) for number in rounds.values()}
    versions = versions_of(client, config, runs.values())
    for alias, number in rounds.items():
        if version := versions.get(runs[number]):
            client.set_registered_model_alias(name, alias, version)
        elif client.search_registered_models(f"name = '{name}'"):
            client.delete_registered_model_alias(name, alias)


def registered_name(config: CampaignConfig) -> str:
    """Name of the campaign's registered model."""
    return f"d3po-{config.campaign}"
