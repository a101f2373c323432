"""MLflow: one parent run a campaign, one child run a round. The only module that imports mlflow.

What MLflow is told is what stages left on disk, so it can be told at any later time: ``deliver`` sends everything that
was not delivered yet. A server that is down costs a warning, never a round. Delivering twice changes nothing.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d3po_core.campaign import campaign_id, stage_path
from d3po_core.config import CampaignConfig, data_folder
from d3po_core.policy import LORA_FILE
from d3po_core.records import DeriveRecord, EvaluateRecord, JudgeRecord, SampleRecord, TrainRecord
from d3po_core.tables import partition, read_rows

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "d3po"
BATCH = 1000
STAGES = ("sample", "judge", "derive", "train", "evaluate", "publish")

logger = logging.getLogger(__name__)
_run_ids: dict[tuple[str, str, int | None], str] = {}


def tracking_uri() -> str:
    """``MLFLOW_TRACKING_URI``, or the sqlite database in the data folder that ``make up`` serves."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{data_folder() / 'mlflow' / 'mlflow.db'}"


def deliver(config: CampaignConfig) -> None:
    """Tell MLflow of every finished stage of the campaign that it was not told of yet."""
    waiting = sorted(_undelivered(config.folder))
    if not waiting:
        return
    try:
        client = _client()
        for round_number, order in waiting:
            stage = STAGES[order]
            run_id = round_run_id(config, round_number)
            _LOGGERS[stage](client, config, round_number, run_id)
            _delivered_path(config.folder, round_number, stage).touch()
    except Exception as error:
        # Whatever keeps MLflow from listening, the round is worth more than its log.
        logger.warning(
            "MLflow at %s did not take %d finished stages (%s); they are kept and delivered with the next one",
            tracking_uri(), len(waiting), " ".join(str(error).split())[:200],
        )  # fmt: skip


def round_run_id(config: CampaignConfig, round_number: int) -> str:
    """The child run of a round, made when there is none; a resumed round goes on in its run."""
    parent = _find_or_create(config, None, f"campaign {config.campaign}", {})
    name = f"{config.campaign} round {round_number:03d}" if round_number else f"{config.campaign} base"
    return _find_or_create(config, round_number, name, {"mlflow.parentRunId": parent})


def known_run_id(config: CampaignConfig, round_number: int) -> str | None:
    """The child run of a round, or None when MLflow cannot be reached."""
    try:
        return round_run_id(config, round_number)
    except Exception:
        return None


def _undelivered(campaign: Path) -> list[tuple[int, int]]:
    records = [path for path in campaign.glob("stages/round=*/*.json") if path.stem in STAGES]
    finished = [(path.parent.name, path.stem) for path in records]
    finished += [(path.parent.name, "publish") for path in campaign.glob("rounds/round=*/part.parquet")]
    numbered = [(int(folder.removeprefix("round=")), stage) for folder, stage in finished]
    return [(n, STAGES.index(s)) for n, s in numbered if not _delivered_path(campaign, n, s).exists()]


def _delivered_path(campaign: Path, round_number: int, stage: str) -> Path:
    return stage_path(campaign, round_number, stage).with_suffix(".delivered")


def _client() -> "MlflowClient":
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    for chatty in ("alembic", "mlflow.store.db.utils", "mlflow.tracking"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    if tracking_uri().startswith("sqlite:///"):
        Path(tracking_uri().removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    return MlflowClient(tracking_uri())


def _experiment(client: "MlflowClient") -> str:
    existing = client.get_experiment_by_name(EXPERIMENT)
    if existing is not None:
        return str(existing.experiment_id)
    # With a local store the artifacts' place must be absolute, or it follows the working directory.
    local = tracking_uri().startswith("sqlite:///")
    location = (data_folder() / "mlflow" / "artifacts").as_uri() if local else None
    tags = {"mlflow.experimentKind": "custom_model_development"}
    return str(client.create_experiment(EXPERIMENT, artifact_location=location, tags=tags))


def _find_or_create(config: CampaignConfig, round_number: int | None, name: str, tags: dict[str, str]) -> str:
    identity = campaign_id(config.folder)
    key = (tracking_uri(), identity, round_number)
    if key not in _run_ids:
        client = _client()
        experiment = _experiment(client)
        level = "campaign" if round_number is None else str(round_number)
        found = client.search_runs(
            [experiment], f"tags.`d3po.campaign_id` = '{identity}' and tags.`d3po.round` = '{level}'", max_results=1
        )
        if found:
            _run_ids[key] = found[0].info.run_id
        else:
            tags = {**tags, "d3po.campaign": config.campaign, "d3po.campaign_id": identity, "d3po.round": level}
            run = client.create_run(experiment, run_name=name, tags=tags)
            _log_params(client, run.info.run_id, config)
            _run_ids[key] = run.info.run_id
    return _run_ids[key]


def _log_params(client: "MlflowClient", run_id: str, config: CampaignConfig) -> None:
    from mlflow.entities import Param

    def flat(values: dict[str, Any], prefix: str = "") -> list[Param]:
        params = []
        for key, value in values.items():
            params += flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [Param(prefix + key, str(value))]
        return params

    client.log_batch(run_id, params=flat(config.model_dump(mode="json")))


def _log_metrics(client: "MlflowClient", run_id: str, rows: list[tuple[str, float | None, int, datetime]]) -> None:
    """Log (name, value, step, time) in batches; the time is that of the stage, so that a repetition is no new point."""
    from mlflow.entities import Metric

    metrics = [Metric(n, float(v), _milliseconds(t), step) for n, v, step, t in rows if v is not None]
    for start in range(0, len(metrics), BATCH):
        client.log_batch(run_id, metrics=metrics[start : start + BATCH])


def _milliseconds(when: datetime) -> int:
    """Milliseconds since the epoch; times without a zone, as tables keep them, are UTC."""
    return int((when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp() * 1000)


def _log_both(
    client: "MlflowClient", config: CampaignConfig, round_number: int, run_id: str, when: datetime | None,
    values: dict[str, float | None],
) -> None:  # fmt: skip
    """Log a round's summary in its own run, and in the campaign's with the round as step: a curve over rounds."""
    assert when is not None
    rows = [(name, value, round_number, when) for name, value in values.items()]
    _log_metrics(client, run_id, rows)
    _log_metrics(client, _find_or_create(config, None, "", {}), rows)


def _log_lineage(client: "MlflowClient", config: CampaignConfig, round_number: int, run_id: str, table: str) -> None:
    """Point from the run to the Parquet files that it wrote or read, by path and digest."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    inputs = []
    for file in sorted(partition(config.folder, table, round_number).glob("*.parquet")):
        digest = hashlib.sha256(file.read_bytes()).hexdigest()[:32]
        source = json.dumps({"uri": str(file)})
        dataset = Dataset(name=f"{table}/{file.stem}", digest=digest, source_type="local", source=source)
        inputs.append(DatasetInput(dataset, [InputTag("mlflow.data.context", table)]))
    client.log_inputs(run_id, inputs)


def _record(config: CampaignConfig, round_number: int, stage: str, kind: Any) -> Any:
    return kind.model_validate_json(stage_path(config.folder, round_number, stage).read_text())


def _log_sample(client: "MlflowClient", config: CampaignConfig, round_number: int, run_id: str) -> None:
    record: SampleRecord = _record(config, round_number, "sample", SampleRecord)
    values = {"sample/images": record.num_samples, "sample/images_per_second": record.num_samples / record.seconds}
    _log_both(client, config, round_number, run_id, record.finished_at, {**values, "seconds/sample": record.seconds})
    client.log_artifact(run_id, str(config.folder / record.contact_sheet))
    client.log_artifact(run_id, str(stage_path(config.folder, round_number, "config")))
    _log_lineage(client, config, round_number, run_id, "samples")


def _log_judge(client: "MlflowClient", config: CampaignConfig, round_number: int, run_id: str) -> None:
    record: JudgeRecord = _record(config, round_number, "judge", JudgeRecord)
    values = {f"judge/{scorer}": mean for scorer, mean in record.mean_scores.items()}
    _log_both(client, config, round_number, run_id, record.finished_at, {**values, "seconds/judge": record.seconds})
    _log_lineage(client, config, round_number, run_id, "judgements")


def _log_derive(client: "MlflowClient", config: CampaignConfig, round_number: int, run_id: str) -> None:
    record: DeriveRecord = _record(config, round_number, "derive", DeriveRecord)
    values = {
        "derive/pairs": record.num_pairs,
        "derive/ties": record.num_ties,
        "derive/agreement": record.mean_agreement,
        "seconds/derive": record.seconds,
    }
    _log_both(client, config, round_number, run_id, record.finished_at, values)
    _log_lineage(client, config, round_number, run_id, "preferences")


def _log_train(client: "MlflowClient", config: CampaignConfig, round_number: int, run_id: str) -> None:
    record: TrainRecord = _record(config, round_number, "train", TrainRecord)
    updates = read_rows(partition(config.folder, "updates", round_number) / "part.parquet")
    steps = read_rows(partition(config.folder, "update_steps", round_number) / "part.parquet")
    finished = {row["update"]: row["finished_at"] for row in updates}
    curves = ("loss", "margin", "pair_accuracy", "kl", "clip_fraction", "grad_norm", "seconds")
    rows = [(f"update/{name}", row[name], row["update"], row["finished_at"]) for row in updates for name in curves]
    rows += [
        (f"timestep_{row['timestep']:04d}/{name}", row[name], row["update"], finished[row["update"]])
        for row in steps
        for name in ("margin", "pair_accuracy", "kl", "clip_fraction")
    ]
    _log_metrics(client, run_id, rows)
    values: dict[str, float | None] = {
        f"train/{name}": getattr(record, name) for name in ("loss", "margin", "pair_accuracy", "kl", "clip_fraction")
    }
    pair_steps = sum(row["num_pairs"] for row in updates) * len({row["step"] for row in steps})
    values["train/pair_steps_per_second"] = pair_steps / record.seconds
    values["seconds/train"] = record.seconds
    _log_both(client, config, round_number, run_id, record.finished_at, values)
    client.log_artifact(run_id, str(config.folder / record.checkpoint / LORA_FILE))
    client.set_tag(run_id, "d3po.lora_sha256", record.lora_sha256)


def _log_evaluate(client: "MlflowClient", config: CampaignConfig, round_number: int, run_id: str) -> None:
    record: EvaluateRecord = _record(config, round_number, "evaluate", EvaluateRecord)
    values: dict[str, float | None] = {"seconds/evaluate": record.seconds}
    for scorer, score in record.scores.items():
        values[f"held_out/{scorer}"] = score.mean
        values[f"held_out/{scorer}_low"], values[f"held_out/{scorer}_high"] = score.low, score.high
    _log_both(client, config, round_number, run_id, record.finished_at, values)
    client.log_artifact(run_id, str(config.folder / record.grid))
    _log_grid_once(client, config, round_number, config.folder / record.grid)
    _log_lineage(client, config, round_number, run_id, "evaluations")


def _log_grid_once(client: "MlflowClient", config: CampaignConfig, round_number: int, grid: Path) -> None:
    """Add the held-out grid to the campaign run's image slider, whose step is the round, unless it is there."""
    from PIL import Image

    parent = _find_or_create(config, None, "", {})
    present = [artifact.path for artifact in client.list_artifacts(parent, "images")]
    # MLflow writes 'key%step%N%timestamp...' on some stores and 'key+step+N+timestamp...' on others.
    if any(Path(path).name.replace("+", "%").startswith(f"held_out%step%{round_number}%") for path in present):
        return
    with Image.open(grid) as image:
        client.log_image(parent, image, key="held_out", step=round_number, synchronous=True)


def _log_publish(client: "MlflowClient", config: CampaignConfig, round_number: int, run_id: str) -> None:
    row = read_rows(partition(config.folder, "rounds", round_number) / "part.parquet")[0]
    _log_both(client, config, round_number, run_id, row["finished_at"], {"seconds/publish": row["publish_seconds"]})
    client.set_tag(run_id, "d3po.git_commit", row["git_commit"] or "unknown")
    client.set_tag(run_id, "d3po.config_sha256", row["config_sha256"])
    client.set_terminated(run_id, "FINISHED", _milliseconds(row["finished_at"]))
    parent = _find_or_create(config, None, "", {})
    client.set_tag(parent, "d3po.last_finished_round", str(round_number))
    client.set_terminated(parent, "FINISHED", _milliseconds(row["finished_at"]))


_LOGGERS: dict[str, Callable[["MlflowClient", CampaignConfig, int, str], None]] = {
    "sample": _log_sample,
    "judge": _log_judge,
    "derive": _log_derive,
    "train": _log_train,
    "evaluate": _log_evaluate,
    "publish": _log_publish,
}
