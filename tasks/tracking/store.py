"""MLflow's store: one parent run per campaign, one child run per round, one model per checkpoint.

Only this module imports mlflow. Every function is safe to call again: repeating a call changes nothing.
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from d3po.tasks.logs import run_logger
from d3po.tasks.tracking.moved import follow_folder
from d3po.tasks.tracking.views import TRAINING, VIEW, experiment_page, view_page
from d3po_core.config import CampaignConfig
from d3po_core.config_values import leaves
from d3po_core.paths import data_folder
from d3po_core.records import EvaluateRecord, SampleRecord
from d3po_core.store.campaign import campaign_id
from d3po_core.store.databases import make_database, sqlite_url
from d3po_core.store.stages import read_record, stage_path
from d3po_core.store.tables import partition
from d3po_core.urls import masked, without_login

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

Client: TypeAlias = "MlflowClient"
EXPERIMENT = "d3po"
NOTE = "mlflow.note.content"
# Beside the held-out curves: MLflow groups charts by the part before the last slash, and sorts groups by name.
SLIDER = "held_out/same seeds"
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
    runs = experiment_page(experiment(mlflow_client()))
    return f"{page.rstrip('/')}{runs}/{campaign_run_id(config)}/{part}{TRAINING}"


def campaign_page(config: CampaignConfig) -> str | None:
    """Address of MLflow's table of exactly this campaign's rounds, None if MLflow has no page."""
    if not (page := page_url()):
        return None
    return page.rstrip("/") + view_page(experiment(mlflow_client()), campaign_id(config.folder))


def log_report(client: Client, config: CampaignConfig, report: Path) -> None:
    """Replace the report in the campaign's run and tag its path; above ``REPORT_BYTES``, only tag the path."""
    parent = campaign_run_id(config)
    client.set_tag(parent, "d3po.report", str(report))
    if report.stat().st_size <= REPORT_BYTES:
        client.log_artifact(parent, str(report))


def round_run_id(config: CampaignConfig, round_number: int) -> str:
    """The child run of a round, created if missing; a resumed round continues in its run."""
    key = (tracking_uri(), campaign_id(config.folder), round_number)
    if key not in _run_ids:
        client, parent = mlflow_client(), campaign_run_id(config)
        wanted = f"tags.`mlflow.parentRunId` = '{parent}' and tags.`d3po.round` = '{round_number}'"
        _run_ids[key] = _find(client, wanted) or _create_round(client, config, round_number, parent)
    return _run_ids[key]


def campaign_run_id(config: CampaignConfig) -> str:
    """The parent run of a campaign, created if missing."""
    key = (tracking_uri(), campaign_id(config.folder), None)
    if key not in _run_ids:
        client = mlflow_client()
        _run_ids[key] = _find(client, _own(config)) or _create_campaign(client, config)
    return _run_ids[key]


def campaign_label(client: Client, config: CampaignConfig) -> str:
    """The campaign's name as MLflow shows it: with a number if the store knew another campaign of that name."""
    tags = client.get_run(campaign_run_id(config)).data.tags
    return str(tags.get("d3po.label", config.campaign))


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
    return _find(mlflow_client(), _own(config))


def forget_runs() -> None:
    """Forget the known runs and look them up again: somebody may have deleted one."""
    _run_ids.clear()


def _own(config: CampaignConfig) -> str:
    return f"tags.`d3po.campaign_id` = '{campaign_id(config.folder)}' and tags.`d3po.round` = 'campaign'"


def _find(client: Client, wanted: str) -> str | None:
    """The run of a campaign or round; a deleted run is restored, because its data is not sent again."""
    from mlflow.entities import ViewType

    found = client.search_runs([experiment(client)], wanted, ViewType.ALL, max_results=1)
    if not found:
        return None
    run = found[0].info
    if run.lifecycle_stage == "deleted":
        client.restore_run(run.run_id)
        run_logger().warning("MLflow's run %r was deleted and is restored: its campaign goes on", run.run_name)
    return str(run.run_id)


def _create_campaign(client: Client, config: CampaignConfig) -> str:
    """Create a campaign's run. It has no parameters: they would fill the card of its images, and rounds have them."""
    from mlflow.entities import ViewType

    name = config.campaign
    same = f"tags.`d3po.campaign` = '{name}' and tags.`d3po.round` = 'campaign'"
    others = len(client.search_runs([experiment(client)], same, ViewType.ALL))
    label = f"{name} ({others + 1})" if others else name
    identity = {"d3po.campaign_id": campaign_id(config.folder), "d3po.round": "campaign", "d3po.campaign": name}
    tags = {**_who_runs(), **identity, **({"d3po.label": label} if others else {})}
    run_name = f"{label}: no round finished"
    return str(client.create_run(experiment(client), _began(config, 0), tags, run_name).info.run_id)


def _create_round(client: Client, config: CampaignConfig, round_number: int, parent: str) -> str:
    name = f"round {round_number}" if round_number else "base"
    own = {"mlflow.parentRunId": parent, "d3po.campaign": config.campaign, "d3po.round": str(round_number)}
    run_name = f"{name}: not finished · {campaign_label(client, config)}"
    run = client.create_run(experiment(client), _began(config, round_number), {**_who_runs(), **own}, run_name)
    _log_params(client, run.info.run_id, config)
    return str(run.info.run_id)


def _began(config: CampaignConfig, round_number: int) -> int | None:
    """When a round's first stage began, in ms; it may be delivered days later. None while it runs."""
    stage, kind = ("sample", SampleRecord) if round_number else ("evaluate", EvaluateRecord)
    if not stage_path(config.folder, round_number, stage).exists():
        return None
    record = read_record(config.folder, round_number, stage, kind)
    assert record.finished_at is not None
    return milliseconds(record.finished_at - timedelta(seconds=record.seconds))


def _who_runs() -> dict[str, str]:
    """User, program and commit, under the names that MLflow's pages show."""
    from mlflow.tracking.context.registry import resolve_tags

    return dict(resolve_tags())


def describe(client: Client, run_id: str, name: str, markdown: str) -> None:
    """Set a run's name and description."""
    client.update_run(run_id, name=name)
    client.set_tag(run_id, NOTE, markdown)


def describe_experiment(client: Client, markdown: str, key: str, view: str) -> None:
    """Set the experiment's description unless it has one, and save a view of its runs under a key."""
    tags = client.get_experiment(experiment(client)).tags
    if NOTE not in tags:
        client.set_experiment_tag(experiment(client), NOTE, markdown)
    if tags.get(f"{VIEW}{key}") != view:
        client.set_experiment_tag(experiment(client), f"{VIEW}{key}", view)


def log_digests(client: Client, run_id: str, digests: dict[str, str | None]) -> None:
    """Keep digests in a file of the run: as tags they would fill the pages where people look for scores."""
    client.log_dict(run_id, digests, "digests.json")


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
    curves: Mapping[str, float | None], own: Mapping[str, float | None] | None = None,
) -> None:  # fmt: skip
    """Log a round's summary.

    Args:
        client: of the store.
        config: of the campaign.
        round_number: the step.
        run_id: the round's run.
        when: time of the metrics.
        curves: logged in the round's run and in the campaign's, which shows each as a curve over rounds.
        own: logged in the round's run only: ends of intervals, and values that hardly ever change.
    """
    assert when is not None
    rows = [(name, value, round_number, when) for name, value in curves.items()]
    log_metrics(client, run_id, rows + [(name, value, round_number, when) for name, value in (own or {}).items()])
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
    from PIL import Image, ImageOps

    parent = campaign_run_id(config)
    present = [artifact.path for artifact in client.list_artifacts(parent, "images")]
    # Some stores write 'key%step%N%timestamp...', others 'key+step+N+timestamp...'.
    start = f"{SLIDER.replace('/', '~')}%step%{round_number}%"
    if any(Path(path).name.replace("+", "%").replace("#", "~").startswith(start) for path in present):
        return
    with Image.open(grid) as image:
        side = max(image.size)
        # MLflow's frame is a square whose lower part its card cuts off, so the images come first.
        square = ImageOps.pad(image.convert("RGBA"), (side, side), color=(0, 0, 0, 0), centering=(0.5, 0))
        client.log_image(parent, square, key=SLIDER, step=round_number, synchronous=True)


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
        name: of the model; MLflow replaces nothing in it and refuses / : . % and quotes.
        folder: holds the weights, and nothing else, since all of it is shipped.
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
        Metric(name, _rounded(value), milliseconds(when), round_number, model_id=model.model_id)
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


def versions_of(client: Client, config: CampaignConfig) -> dict[str, str]:
    """The versions of the campaign's registered model, by the id of the run that each came from."""
    return {str(v.run_id): str(v.version) for v in client.search_model_versions(f"name = '{registered_name(config)}'")}


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
    name, versions = registered_name(config), versions_of(client, config)
    for alias, number in rounds.items():
        if version := versions.get(round_run_id(config, number)):
            client.set_registered_model_alias(name, alias, version)
        elif versions:
            client.delete_registered_model_alias(name, alias)


def registered_name(config: CampaignConfig) -> str:
    """Name of the campaign's registered model."""
    return f"d3po-{config.campaign}"
