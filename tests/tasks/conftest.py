"""A campaign of two rounds that the stages of a run made, without Prefect and MLflow."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from d3po.tasks.evaluating import _evaluate
from d3po.tasks.judging import _derive, _judge
from d3po.tasks.publishing import note_published
from d3po.tasks.sampling import _sample
from d3po.tasks.tracking import delivery
from d3po.tasks.training import _train
from d3po_core.config import CampaignConfig
from d3po_core.config_values import load_config
from d3po_core.models.loaded import loaded_policy
from d3po_core.models.policy import Policy
from d3po_core.models.weights import weights_sha256
from d3po_core.records import EvaluateRecord
from d3po_core.store.campaign import begin_round, open_campaign
from d3po_core.store.stages import checkpoint_path, finish_stage
from d3po_core.store.tables import SCHEMAS, table_from_rows, write_table

TRAIN = [
    "a red circle on a gray background",
    "a blue cross on a white background",
    "a cyan square on a black background",
]
HELD_OUT = [
    "a red cross on a black background",
    "a yellow circle on a white background",
    "a blue square on a gray background",
]
# Five groups of three prompts, so that prompts come twice; shards of two groups; held-out images in batches of 6.
SETTINGS: dict[str, Any] = {
    "campaign": "tiny",
    "seed": 5,
    "model": {"device": "cpu", "lora_rank": 4},
    "sample": {"groups_per_round": 5, "group_size": 3, "num_steps": 3, "batch_size": 6},
    "judge": {"scorers": ["brightness"]},
    "train": {"updates_per_round": 2, "micro_batch": 16, "learning_rate": 1e-2},
    "evaluate": {"images_per_prompt": 4, "scorers": ["brightness"], "grid_prompts": 1},
}


def settings_in(folder: Path) -> dict[str, Any]:
    """The settings of a campaign in a folder, with files of prompts there."""
    for name, prompts in (("train", TRAIN), ("held_out", HELD_OUT)):
        (folder / f"{name}.txt").write_text("\n".join(prompts))
    values: dict[str, Any] = json.loads(json.dumps(SETTINGS)) | {"runs_dir": str(folder / "runs")}
    values["sample"]["prompts"] = str(folder / "train.txt")
    values["evaluate"]["prompts"] = str(folder / "held_out.txt")
    return values


def evaluate_and_publish(config: CampaignConfig, number: int) -> None:
    """Finish a round: its held-out images, and its row of ``rounds``."""
    record = finish_stage(config.folder, number, "evaluate", EvaluateRecord, lambda: _evaluate(config, number))
    write_table(config.folder, "rounds", number, table_from_rows("rounds", [round_row(config, number, record)]))


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> CampaignConfig:
    """A finished campaign of two rounds; its files of prompts are gone since."""
    folder = tmp_path_factory.mktemp("data")
    config = load_config(settings_in(folder), "test")
    open_campaign(config)
    for number in range(3):
        begin_round(config, number)
        if number:
            for work in (_sample, _judge, _derive, _train):
                work(config, number)
        evaluate_and_publish(config, number)
        if number < 2:  # the last one is as a kill, or an earlier version, left it
            note_published(config.folder, number)
    for name in ("train", "held_out"):
        (folder / f"{name}.txt").unlink()
    return config


def round_row(config: CampaignConfig, number: int, record: EvaluateRecord) -> dict[str, Any]:
    checkpoint = checkpoint_path(number)
    score = record.scores["brightness"]
    row: dict[str, Any] = dict.fromkeys(SCHEMAS["rounds"].names)
    row |= {f"{stage}_seconds": 1.0 for stage in ("sample", "judge", "derive", "train", "evaluate", "publish")}
    return row | {
        "checkpoint_in": checkpoint_path(max(number - 1, 0)), "checkpoint_out": checkpoint,
        "lora_sha256": weights_sha256(config.folder / checkpoint) if checkpoint else None, "num_samples": 15,
        "num_pairs": 1, "num_ties": 0, "eval_scorer": "brightness", "eval_score_mean": score.mean,
        "eval_score_low": score.ends[0], "eval_score_high": score.ends[1], "config_sha256": config.sha256(),
        "finished_at": record.finished_at,
    }  # fmt: skip


@pytest.fixture(autouse=True)
def no_tracking_uri(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow sets the variable itself, in the middle of a test: monkeypatch knows it here, and takes it away."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")


@pytest.fixture
def campaign(config: CampaignConfig, tmp_path: Path) -> Path:
    """A copy that a test may change; it lies elsewhere than its configuration says."""
    return Path(shutil.copytree(config.folder, tmp_path / "runs" / "tiny"))


@pytest.fixture
def model(config: CampaignConfig) -> Policy:
    """The model on one thread, as the campaign was made."""
    assert torch.get_num_threads() == 1
    return loaded_policy(config)


@pytest.fixture(scope="session")
def new_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database as MLflow makes it, which takes it a second."""
    from mlflow import MlflowClient

    file = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture
def own(
    config: CampaignConfig, campaign: Path, tmp_path: Path, new_store: Path, monkeypatch: pytest.MonkeyPatch
) -> CampaignConfig:
    """The finished campaign, of which no store knows; MLflow's store is the data folder's own."""
    (tmp_path / "data" / "mlflow").mkdir(parents=True)
    shutil.copy(new_store, tmp_path / "data" / "mlflow")
    monkeypatch.setenv("D3PO_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(delivery, "_left_alone_until", {})
    return config.model_copy(update={"runs_dir": str(campaign.parent)})
