"""Learned scorers with a processor of their own score finished shards while others are sampled."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from d3po.tasks.judging import _judge
from d3po.tasks.sampling import _sample
from d3po_core.config import CampaignConfig
from d3po_core.config_values import load_config
from d3po_core.devices import check_processes
from d3po_core.errors import D3POError
from d3po_core.processes.engine import end_processes, run_job
from d3po_core.sampling.job import round_shards
from d3po_core.scorers.finding import check_scoring_gpus
from d3po_core.scorers.shards import scores_path
from d3po_core.store.tables import partition
from tests.core.scorers.small_scorers import clip_folder
from tests.tasks.test_scoring import wait_until


@pytest.fixture(autouse=True)
def ray_ends() -> Iterator[None]:
    yield
    end_processes()


def configured(folder: Path, **scoring: Any) -> CampaignConfig:
    values = {
        "campaign": f"gpus-{scoring.get('gpus', 0)}", "runs_dir": str(folder / "runs"),
        "model": {"device": "cpu", "lora_rank": 4},
        "sample": {"groups_per_round": 3, "group_size": 3, "num_steps": 2, "batch_size": 3},
        "judge": {"scorers": ["clip_score", "brightness"]},
        "scoring": {"models": {"clip_score": str(folder / "clip")}, **scoring},
    }  # fmt: skip
    return load_config(values, "test")


def values_of(config: CampaignConfig, scorer: str) -> list[float]:
    """A scorer's judgements of the round, image after image."""
    rows = pq.ParquetFile(partition(config.folder, "judgements", 1) / "proxy.parquet").read().to_pylist()
    return [row["value"] for row in sorted(rows, key=lambda row: row["sample_id"]) if row["rater"] == scorer]


@pytest.mark.timeout(400)
def test_scores_are_those_of_one_process_and_come_while_others_are_sampled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip_folder(tmp_path / "clip")
    plain, apart = configured(tmp_path), configured(tmp_path, gpus=1)
    _sample(plain, 1)
    _judge(plain, 1)

    def hold(*arguments: Any) -> None:  # the sampling ends once a shard has its scores
        run_job(*arguments)
        wait_until(lambda: any(scores_path(shard).exists() for shard in round_shards(apart, 1)))

    monkeypatch.setattr("d3po.tasks.sampling.run_job", hold)
    _sample(apart, 1)
    assert (apart.folder / "logs/scorer-0.log").exists()
    _judge(apart, 1)
    assert all(scores_path(shard).exists() for shard in round_shards(apart, 1))
    assert values_of(apart, "brightness") == values_of(plain, "brightness"), "other images"
    # Shard by shard, so that a batch's rounding is another.
    assert values_of(apart, "clip_score") == pytest.approx(values_of(plain, "clip_score"), rel=1e-5)


def test_more_processes_and_scorers_than_gpus_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    values = configured(tmp_path, gpus=1).model_dump()
    values["model"]["device"] = "cuda"
    with pytest.raises(D3POError, match=r"^compute\.processes is 1 and scoring\.gpus 1 but 1 CUDA device is visible"):
        check_processes(load_config(values, "test"))


@pytest.mark.parametrize("clip", ["", "http://127.0.0.1:1/"], ids=["proxy", "server"])
def test_gpus_for_scorers_that_need_none_are_refused(tmp_path: Path, clip: str) -> None:
    values = configured(tmp_path, gpus=1).model_dump()
    values["judge"]["scorers"] = ["clip_score"] if clip else ["brightness"]
    values["scoring"]["models"] = {"clip_score": clip} if clip else {}
    with pytest.raises(D3POError, match=r"^scoring\.gpus is 1 but judge\.scorers \((brightness|clip_score)\) names no"):
        check_scoring_gpus(load_config(values, "test"))
