"""MLflow's store: one parent run per campaign, one child run per round, one model per checkpoint.

Only this module imports mlflow. Every function is safe to call again: repeating a call changes nothing.
"""

import hashlib
import json
import logging
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from d3po.tasks.logs import run_logger
from d3po.tasks.tracking.moved import follow_folder
from d3po_core.config import CampaignConfig
from d3po_core.config_values import leaves
from d3po_core.paths import data_folder
from d3po_core.store.campaign import campaign_id
from d3po_core.store.databases import make_database, sqlite_url
from d3po_core.store.tables import partition
from d3po_core.urls import masked, without_login

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

Client: TypeAlias = "MlflowClient"
EXPERIMENT = "d3po"
BATCH = 1000
REPORT_BYTES = 5_000_000

# Significant digits of a logged number; MLflow's tables show as many as they get.
DIGITS = 6
# By default MLflow tries a silent server eight times, two minutes each.
PATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "20", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}

_run_ids: dict[tuple[str, str, int | None], str] = {}


def tracking_uri() -> str:
    """``MLFLOW_TRACKING_URI``, or the data folder's sqlite database, which ``make up`` serves."""
    return os.environ.get("MLFLOW_TRACKING_URI") or sqlite_url(local_database())


def local_database() -> Path:
    """The database in the data folder."""
    return data_folder() / "mlflow" / "mlflow.db"


def make_local_store() -> None:
    """Make the database in the data folder unless it exists, complete or not at all.

    Raises:
        D3POError: the folder cannot be written.
    """
    _prepare()
    from mlflow import MlflowClient

    # MLflow creates the experiment "Default" last.
    make_database(
        local_database(), lambda file: MlflowClient(sqlite_url(file)).search_experiments(max_results=1), "experiments"
    )


def page_url() -> str | None:
    """Address of MLflow's page, without a login: the server's, or that of ``d3po up`` for the local store."""
    uri = tracking_uri()
    return without_login(uri) if uri.startswith("http") else os.environ.get("D3PO_MLFLOW_URL")


def run_page(config: CampaignConfig, part: str) -> str | None:
    """Address of a part of the campaign run's page, None if MLflow has no page."""
    if not (page := page_url()):
        return None
    run = f"experiments/{experiment(mlflow_client())}/runs/{campaign_run_id(config)}"
    return f"{page.rstrip('/')}/#/{run}/{part}?workflowType=machine_learning"  # else the page opens in its other mode


def log_report(client: Client, config: CampaignConfig, report: Path) -> None:
    """Replace the report in the campaign's run and tag its path; above ``REPORT_BYTES``, only tag the path."""
    parent = campaign_run_id(config)
    client.set_tag(parent, "d3po.report", str(report))
    if report.stat().st_size <= REPORT_BYTES:
        client.log_artifact(parent, str(report))


def round_run_id(config: CampaignConfig, round_number: int) -> str:
    """The child run of a round, created if missing; a resumed round continues in its run."""
    parent = campaign_run_id(config)
    name = f"{config.campaign} round {round_number:03d}" if round_number else f"{config.campaign} base"
    return _find_or_create(config, round_number, name, {"mlflow.parentRunId": parent})


def campaign_run_id(config: CampaignConfig) -> str:
    """The parent run of a campaign, created if missing."""
    return _find_or_create(config, None, f"campaign {config.campaign}", {})


def mlflow_client() -> Client:
    """A client of the tracking store; a missing local store is created."""
    _prepare()
    from mlflow import MlflowClient, set_tracking_uri

    if not os.environ.get("MLFLOW_TRACKING_URI"):  # true only at a process's first call: MLflow then sets it itself
        make_local_store()
        follow_local_store()
    elif tracking_uri().startswith("sqlite:///"):
        Path(tracking_uri().removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    # The registry finds models through the process's own setting.
    set_tracking_uri(tracking_uri())
    return MlflowClient(tracking_uri())


def _prepare() -> None:
    """Set MLflow's timeouts and make it quiet; it reads its settings on import."""
    for name, value in {"MLFLOW_DISABLE_TELEMETRY": "true", **PATIENCE}.items():
        os.environ.setdefault(name, value)
    import mlflow  # noqa: F401 (sets the levels of its loggers)

    for chatty in ("alembic", "mlflow.store.db.utils", "mlflow.tracking"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def follow_local_store() -> None:
    """Update the paths in the data folder's store, in case the folder was moved or copied."""
    follow_folder(local_database(), EXPERIMENT)


def experiment(client: Client) -> str:
    """Id of the experiment that holds all campaigns; created if missing, restored if deleted."""
    existing = client.get_experiment_by_name(EXPERIMENT)
    if existing is not None:
        if existing.lifecycle_stage == "deleted":
            client.restore_experiment(existing.experiment_id)
            run_logger().warning(
                "MLflow's experiment %r was deleted and is restored: it holds all campaigns, and nothing can be "
                "delivered without it; to be rid of one campaign, delete its run", EXPERIMENT,
            )  # fmt: skip
        return str(existing.experiment_id)
    # With a local store the location must be absolute, or it follows the working directory.
    local = tracking_uri().startswith("sqlite")
    location = (data_folder() / "mlflow" / "artifacts").as_uri() if local else None
    tags = {"mlflow.experimentKind": "custom_model_development"}
    return str(client.create_experiment(EXPERIMENT, artifact_location=location, tags=tags))


def existing_campaign_run(config: CampaignConfig) -> str | None:
    """The parent run of a campaign, None if the store has none."""
    return _find(mlflow_client(), config, None)


def forget_runs() -> None:
    """Forget the known runs and look them up again: somebody may have deleted one."""
    _run_ids.clear()


def _find_or_create(config: CampaignConfig, round_number: int | None, name: str, tags: dict[str, str]) -> str:
    key = (tracking_uri(), campaign_id(config.folder), round_number)
    if key not in _run_ids:
        client = mlflow_client()
        _run_ids[key] = _find(client, config, round_number) or _create(client, config, round_number, name, tags)
    return _run_ids[key]


def _find(client: Client, config: CampaignConfig, round_number: int | None) -> str | None:
    """The run of a campaign or round; a deleted run is restored, because its data is not sent again."""
    from mlflow.entities import ViewType

    wanted = (
        f"tags.`d3po.campaign_id` = '{campaign_id(config.folder)}' and tags.`d3po.round` = '{_level(round_number)}'"
    )
    found = client.search_runs([experiment(client)], wanted, ViewType.ALL, max_results=1)
    if not found:
        return None
    run = found[0].info
    if run.lifecycle_stage == "deleted":
        client.restore_run(run.run_id)
        run_logger().warning("MLflow's run %r was deleted and is restored: its campaign goes on", run.run_name)
    return str(run.run_id)


def _create(client: Client, config: CampaignConfig, round_number: int | None, name: str, tags: dict[str, str]) -> str:
    identity = {"d3po.campaign_id": campaign_id(config.folder), "d3po.round": _level(round_number)}
    tags = {**_who_runs(), **tags, "d3po.campaign": config.campaign, **identity}
    run = client.create_run(experiment(client), run_name=name, tags=tags)
    _log_params(client, run.info.run_id, config)
    return str(run.info.run_id)


def _level(round_number: int | None) -> str:
    return "campaign" if round_number is None else str(round_number)


def _who_runs() -> dict[str, str]:
    """User, program and commit, under the names that MLflow's pages show."""
    from mlflow.tracking.context.registry import resolve_tags

    return dict(resolve_tags())


def describe(client: Client, run_id: str, markdown: str) -> None:
    """Set a run's description."""
    client.set_tag(run_id, "mlflow.note.content", markdown)


def _log_params(client: Client, run_id: str, config: CampaignConfig) -> None:
    from mlflow.entities import Param

    params = [Param(name, masked(str(value))) for name, value in leaves(config.model_dump(mode="json")).items()]
    client.log_batch(run_id, params=params)


def log_metrics(client: Client, run_id: str, rows: list[tuple[str, float | None, int, datetime]]) -> None:
    """Log (name, value, step, time) in batches; with the stage's time, a repeated call adds no new point."""
    from mlflow.entities import Metric

    metrics = [Metric(n, _rounded(v), milliseconds(t), step) for n, v, step, t in rows if v is not None]
    for start in range(0, len(metrics), BATCH):
        client.log_batch(run_id, metrics=metrics[start : start + BATCH])


def _rounded(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def milliseconds(when: datetime) -> int:
    """Milliseconds since the epoch; a time without a zone, as in our tables, is UTC."""
    return int((when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp() * 1000)


def log_both(
    client: Client, config: CampaignConfig, round_number: int, run_id: str, when: datetime | None,
    values: dict[str, float | None],
) -> None:  # fmt: skip
    """Log a round's summary in its run, and in the campaign's with the round as step: a curve over rounds."""
    assert when is not None
    rows = [(name, value, round_number, when) for name, value in values.items()]
    log_metrics(client, run_id, rows)
    log_metrics(client, campaign_run_id(config), rows)


def log_lineage(client: Client, config: CampaignConfig, round_number: int, run_id: str, table: str) -> None:
    """Link the Parquet files that the run wrote or read, by path and digest."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    inputs = []
    for file in sorted(partition(config.folder, table, round_number).glob("*.parquet")):
        digest = hashlib.sha256(file.read_bytes()).hexdigest()[:32]
        source = json.dumps({"uri": str(file)})
        dataset = Dataset(name=f"{table}/{file.stem}", digest=digest, source_type="local", source=source)
        inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", table)]))
    client.log_inputs(run_id, inputs)


def log_grid_once(client: Client, config: CampaignConfig, round_number: int, grid: Path) -> None:
    """Add the held-out grid to the campaign run's image slider, with the round as step, unless it is there."""
    from PIL import Image

    parent = campaign_run_id(config)
    present = [artifact.path for artifact in client.list_artifacts(parent, "images")]
    # Some stores write 'key%step%N%timestamp...', others 'key+step+N+timestamp...'.
    if any(Path(path).name.replace("+", "%").startswith(f"held_out%step%{round_number}%") for path in present):
        return
    with Image.open(grid) as image:
        client.log_image(parent, image, key="held_out", step=round_number, synchronous=True)


def log_checkpoint(
    client: Client, config: CampaignConfig, round_number: int, run_id: str, folder: Path, tags: dict[str, str],
    metrics: dict[str, float | None], when: datetime,
) -> "LoggedModel":  # fmt: skip
    """Log a checkpoint as a model of its run, with its held-out metrics, unless it is there.

    Args:
        client: of the store.
        config: of the campaign.
        round_number: the checkpoint's round.
        run_id: the round's run.
        folder: holds the weights, and nothing else, since all of it is shipped.
        tags: of the model.
        metrics: of the model; MLflow sorts models by them.
        when: time of the metrics.
    """
    from mlflow.entities import LoggedModelOutput, LoggedModelStatus

    identity = {"d3po.campaign_id": campaign_id(config.folder), "d3po.round": str(round_number)}
    model = _logged_model(client, identity)
    if model is None or model.status != LoggedModelStatus.READY:
        model = client.create_logged_model(
            experiment(client), name=f"{config.campaign}-round-{round_number:03d}", source_run_id=run_id,
            tags={**identity, **tags}, model_type=config.model.train,
        )  # fmt: skip
        client.log_model_artifacts(model.model_id, str(folder))
        _log_model_metrics(client, model, round_number, run_id, metrics, when)
        client.log_outputs(run_id, [LoggedModelOutput(model.model_id, round_number)])
        model = client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)
    return model


def log_to_model(
    client: Client, config: CampaignConfig, round_number: int, run_id: str, metrics: dict[str, float | None],
    when: datetime,
) -> None:  # fmt: skip
    """Add metrics to the model of a round's checkpoint, if it was logged."""
    identity = {"d3po.campaign_id": campaign_id(config.folder), "d3po.round": str(round_number)}
    if (model := _logged_model(client, identity)) is not None:
        _log_model_metrics(client, model, round_number, run_id, metrics, when)


def _logged_model(client: Client, tags: dict[str, str]) -> "LoggedModel | None":
    wanted = " AND ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
    return next(iter(client.search_logged_models([experiment(client)], wanted)), None)


def _log_model_metrics(
    client: Client, model: "LoggedModel", round_number: int, run_id: str, metrics: dict[str, float | None],
    when: datetime,
) -> None:  # fmt: skip
    from mlflow.entities import Metric

    values = [
        Metric(name, _rounded(value), milliseconds(when), round_number, model_id=model.model_id)
        for name, value in metrics.items() if value is not None
    ]  # fmt: skip
    client.log_batch(run_id, metrics=values)


def register_version(
    client: Client, config: CampaignConfig, model: "LoggedModel", run_id: str, tags: dict[str, str]
) -> str:  # fmt: skip
    """The version of the campaign's registered model for this checkpoint; created if missing."""
    from mlflow.exceptions import MlflowException

    name = registered_name(config)
    try:
        client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        client.create_registered_model(name, description=f"Checkpoints of the D3PO campaign {config.campaign}.")
        for earlier in _earlier_models(client, config, model):  # somebody deleted the registered model
            _register(client, name, earlier, str(earlier.source_run_id), {**earlier.tags})
    present = client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
    return str(present[0].version) if present else _register(client, name, model, run_id, tags)


def _register(client: Client, name: str, model: "LoggedModel", run_id: str, tags: dict[str, str]) -> str:
    own = {key: value for key, value in tags.items() if key.startswith("d3po.")}
    made = client.create_model_version(
        name, source=f"models:/{model.model_id}", run_id=run_id, tags=own, model_id=model.model_id
    )
    return str(made.version)


def _earlier_models(client: Client, config: CampaignConfig, model: "LoggedModel") -> list["LoggedModel"]:
    """The campaign's other checkpoints in MLflow, in order of rounds."""
    wanted, found, token = f"tags.`d3po.campaign_id` = '{campaign_id(config.folder)}'", [], None
    while True:
        page = client.search_logged_models([experiment(client)], wanted, page_token=token)
        found += [other for other in page if other.model_id != model.model_id]
        if not (token := page.token):
            return sorted(found, key=lambda other: int(other.tags["d3po.round"]))


def describe_version(client: Client, config: CampaignConfig, model: "LoggedModel", version: str, text: str) -> None:
    """Set a version's description, and link the version on the model's page."""
    name = registered_name(config)
    client.update_model_version(name, version, description=text)
    client.set_logged_model_tags(
        model.model_id, {"mlflow.modelVersions": json.dumps([{"name": name, "version": version}])}
    )


def set_aliases(client: Client, config: CampaignConfig, rounds: dict[str, int]) -> None:
    """Point the registered model's aliases to these rounds' versions; remove aliases of rounds without one."""
    name, identity = registered_name(config), campaign_id(config.folder)
    versions = client.search_model_versions(f"name = '{name}'")
    own = [version for version in versions if version.tags.get("d3po.campaign_id") == identity]
    version_of = {version.tags.get("d3po.round"): str(version.version) for version in own}
    for alias, number in rounds.items():
        if version := version_of.get(str(number)):
            client.set_registered_model_alias(name, alias, version)
        elif versions:
            client.delete_registered_model_alias(name, alias)


def registered_name(config: CampaignConfig) -> str:
    """Name of the campaign's registered model."""
    return f"d3po-{config.campaign}"
