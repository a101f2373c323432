"""MLflow's store: one parent run per campaign, one child run per round.

Only this module and ``registry`` import mlflow. Every function is safe to call again: repeating a call changes nothing.
"""

import json
import logging
import os
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from d3po.tasks.logs import run_logger
from d3po.tasks.tracking.moved import follow_folder
from d3po.tasks.tracking.views import EXPERIMENT, TRAINING, VIEW, experiment_page, view_page
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

Client: TypeAlias = "MlflowClient"
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
    """``MLFLOW_TRACKING_URI``, or the data folder's sqlite database, which ``d3po up`` serves."""
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
    """When a round's first stage began, in ms, because it may be delivered days later; None if none is finished."""
    for stage, kind in (("sample", SampleRecord), ("evaluate", EvaluateRecord)):
        if stage_path(config.folder, round_number, stage).exists():
            record = read_record(config.folder, round_number, stage, kind)
            assert record.finished_at is not None
            return milliseconds(record.finished_at - timedelta(seconds=record.seconds))
    return None


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


def log_digests(client: Client, run_id: str, digests: dict[str, Any]) -> None:
    """Keep digests in a file of the run: as tags they would fill the pages where people look for scores."""
    client.log_dict(run_id, digests, "digests.json")


def _log_params(client: Client, run_id: str, config: CampaignConfig) -> None:
    from mlflow.entities import Param

    params = [Param(name, masked(str(value))) for name, value in leaves(config.model_dump(mode="json")).items()]
    client.log_batch(run_id, params=params)


def log_metrics(client: Client, run_id: str, rows: list[tuple[str, float | None, int, datetime]]) -> None:
    """Log (name, value, step, time) in batches; with the stage's time, a repeated call adds no new point."""
    from mlflow.entities import Metric

    metrics = [Metric(n, rounded(v), milliseconds(t), step) for n, v, step, t in rows if v is not None]
    for start in range(0, len(metrics), BATCH):
        client.log_batch(run_id, metrics=metrics[start : start + BATCH])


def rounded(value: float) -> float:
    """A number with as many digits as MLflow's tables should show."""
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
    """Link the Parquet files that the run wrote or read, by path; MLflow's tables show the name in place of a digest.

    ``digests.json`` has the files' digests.
    """
    from mlflow.entities import Dataset, DatasetInput, InputTag

    inputs = []
    shown = f"round {round_number}, {campaign_id(config.folder)[:8]}"  # one for each file in MLflow, at most 36 letters
    for file in sorted(partition(config.folder, table, round_number).glob("*.parquet")):
        source = json.dumps({"uri": str(file)})
        dataset = Dataset(name=f"{table}/{file.stem}", digest=shown, source_type="local", source=source)
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
