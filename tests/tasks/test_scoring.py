"""A round judged by a learned scorer and a server together, mixed by weights, on the embedded model."""

import base64
import io
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from d3po.tasks import sampling, scoring
from d3po.tasks.evaluating import _evaluate
from d3po.tasks.judging import _derive, _judge
from d3po.tasks.publishing import check_campaign
from d3po.tasks.sampling import _sample
from d3po.tasks.scoring import scored_early
from d3po_core.config import CampaignConfig
from d3po_core.config_values import load_config
from d3po_core.errors import D3POError
from d3po_core.processes.job import Job, Tell
from d3po_core.sampling.job import round_shards
from d3po_core.scorers import shards
from d3po_core.scorers.shards import ShardScores, scores_path, shard_scorers, write_scores
from d3po_core.store.tables import partition, read_rows
from tests.core.scorers.small_scorers import clip_folder


@dataclass
class Redness:
    """A server that scores the mean of red, what it was asked and answered so far, and whether it works."""

    url: str = ""
    answered: list[int] = field(default_factory=list)
    asked: int = 0
    broken: bool = False
    answers: threading.Event = field(default_factory=threading.Event)


@pytest.fixture
def redness(monkeypatch: pytest.MonkeyPatch) -> Iterator[Redness]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    state = Redness()
    state.answers.set()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            images = [np.asarray(Image.open(io.BytesIO(base64.b64decode(png)))) for png in content["images"]]
            state.asked += 1
            assert state.answers.wait(60)
            self.send_response(400 if state.broken else 200)
            self.end_headers()
            if not state.broken:
                state.answered.append(len(images))
            self.wfile.write(json.dumps({"scores": [float(image[..., 0].mean()) for image in images]}).encode())

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}/"
    yield state
    server.shutdown()
    server.server_close()


@pytest.fixture
def config(tmp_path: Path, redness: Redness) -> CampaignConfig:
    clip_folder(tmp_path / "clip")
    values = {
        "campaign": "mixed",
        "runs_dir": str(tmp_path / "runs"),
        "model": {"device": "cpu", "lora_rank": 4},
        "sample": {"groups_per_round": 3, "group_size": 3, "num_steps": 2},
        "judge": {
            "scorers": ["clip_score", "redness"], "combine": "weighted", "scorer_weights": {"redness": 2},
        },
        "scoring": {"models": {"clip_score": str(tmp_path / "clip"), "redness": redness.url}, "batch_size": 4},
        "evaluate": {"images_per_prompt": 1, "max_prompts": 2, "scorers": ["clip_score"], "unseen": ["redness"],
                     "grid_prompts": 1, "drift_images": 0},
    }  # fmt: skip
    return load_config(values, "test")


def test_learned_and_remote_scorers_judge_and_evaluate_a_round_together(config: CampaignConfig) -> None:
    check_campaign(config)
    _sample(config, 1)
    record = _judge(config, 1)
    assert set(record.mean_scores) == {"clip_score", "redness"}
    samples = read_rows(partition(config.folder, "samples", 1) / "part.parquet")
    judgements = read_rows(partition(config.folder, "judgements", 1) / "proxy.parquet")
    score = {(row["rater"], row["sample_id"]): row["value"] for row in judgements}
    for sample in samples:
        red = np.asarray(Image.open(config.folder / sample["image_path"]))[..., 0].mean()
        assert score["redness", sample["sample_id"]] == pytest.approx(red)

    ids = [sample["sample_id"] for sample in samples]
    both = np.array([[score[name, i] for name in ("clip_score", "redness")] for i in ids])
    total = dict(zip(ids, (both / both.std(axis=0)) @ [1, 2], strict=True))
    expected = {
        tuple(sorted((a["sample_id"], b["sample_id"]), key=lambda i: -total[i]))
        for a, b in itertools.combinations(samples, 2)
        if a["group_id"] == b["group_id"]
    }
    _derive(config, 1)
    pairs = read_rows(partition(config.folder, "preferences", 1) / "part.parquet")
    assert {(row["winner_id"], row["loser_id"]) for row in pairs} == expected

    evaluated = _evaluate(config, 0)
    assert list(evaluated.scores) == ["clip_score", "redness"]


def test_scorer_that_is_not_there_is_known_before_anything_is_sampled(config: CampaignConfig, tmp_path: Path) -> None:
    (tmp_path / "clip" / "tokenizer_config.json").unlink()
    (tmp_path / "clip" / "model.safetensors").unlink()
    with pytest.raises(D3POError, match=r"scorer 'clip_score': .*model\.safetensors is missing"):
        check_campaign(config)
    assert not config.folder.exists()


SHARDS, IMAGES = 3, 9  # of the configuration below: every group of three is a shard


@pytest.fixture
def in_shards(config: CampaignConfig) -> CampaignConfig:
    """A round of several shards, judged by the server alone."""
    values = config.model_dump()
    values["sample"]["batch_size"] = 3
    values["judge"] |= {"scorers": ["redness"], "combine": "pareto", "scorer_weights": {}}
    return load_config(values, "test")


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def judged(config: CampaignConfig) -> tuple[pa.Table, pa.Table]:
    """What the stage judge writes, without when."""
    judgements = pq.ParquetFile(partition(config.folder, "judgements", 1) / "proxy.parquet").read()
    groups = pq.ParquetFile(partition(config.folder, "groups", 1) / "part.parquet").read()
    return judgements.drop_columns("judged_at"), groups


def sampling_that(monkeypatch: pytest.MonkeyPatch, afterwards: Callable[[], None]) -> None:
    """Let the sampling's job do something more before it is over."""
    run_job = sampling.run_job

    def run(job: Job, config: CampaignConfig, round_number: int, tell: Tell) -> None:
        run_job(job, config, round_number, tell)
        afterwards()

    monkeypatch.setattr(sampling, "run_job", run)


def test_server_is_asked_about_finished_shards_while_the_model_samples(
    in_shards: CampaignConfig, redness: Redness, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling_that(monkeypatch, lambda: wait_until(lambda: sum(redness.answered) == IMAGES))
    _sample(in_shards, 1)
    assert redness.answered == [3] * SHARDS
    _judge(in_shards, 1)
    assert sum(redness.answered) == IMAGES, "the judge asked again about shards that were scored"
    early = judged(in_shards)
    _judge(in_shards, 1)  # as another process after a kill: what was said is not asked again
    assert sum(redness.answered) == IMAGES
    assert judged(in_shards) == early

    for path in (in_shards.folder / "staging/round=1").glob("*.scores.json"):
        path.unlink()
    _judge(in_shards, 1)
    assert redness.answered == [3] * SHARDS * 2
    assert judged(in_shards) == early


def test_early_scores_of_other_scorers_are_not_taken(in_shards: CampaignConfig, redness: Redness) -> None:
    _sample(in_shards, 1)
    for path in (in_shards.folder / "staging/round=1").glob("*.scores.json"):
        path.unlink()
    for shard in round_shards(in_shards, 1):
        write_scores(shard, ShardScores({"another": [1.0] * 3}, [0.5]))
    redness.answered.clear()
    assert scored_early(in_shards, round_shards(in_shards, 1)) == {}
    assert set(_judge(in_shards, 1).mean_scores) == {"redness"}
    assert sum(redness.answered) == IMAGES


def test_a_changed_digit_of_an_early_score_is_one_line(in_shards: CampaignConfig) -> None:
    _sample(in_shards, 1)
    shard = round_shards(in_shards, 1)[0]
    write_scores(shard, ShardScores({"redness": [123.5] * 3}, [0.5]))
    path = scores_path(shard)
    path.write_text(path.read_text().replace("123.5", "124.5", 1))
    with pytest.raises(D3POError, match=r"shard-0000\.scores\.json: has other content .*remove it: the scorers are"):
        _judge(in_shards, 1)


def test_every_image_is_asked_about_once_whenever_the_sampling_ends(
    in_shards: CampaignConfig, redness: Redness
) -> None:
    _sample(in_shards, 1)
    record = _judge(in_shards, 1)
    assert record.num_judgements == sum(redness.answered) == IMAGES


def test_a_sampling_that_failed_and_is_done_again_asks_about_no_shard_twice(
    in_shards: CampaignConfig, redness: Redness, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        # An answer that arrives while the sampling fails is asked for again; these are all on disk.
        wait_until(lambda: len(list(in_shards.folder.rglob("*.scores.json"))) == SHARDS)
        raise RuntimeError("the card is gone")

    with monkeypatch.context() as patch:
        sampling_that(patch, fail)
        with pytest.raises(RuntimeError, match="the card is gone"):
            _sample(in_shards, 1)
    _sample(in_shards, 1)
    assert _judge(in_shards, 1).num_judgements == IMAGES == sum(redness.answered)


def test_server_that_fails_meanwhile_is_told_of_stops_no_sampling_and_is_asked_again(
    in_shards: CampaignConfig, redness: Redness, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    redness.broken = True
    sampling_that(monkeypatch, lambda: wait_until(lambda: "scorer 'redness'" in caplog.text))
    _sample(in_shards, 1)
    assert "answered 400" in caplog.text
    assert redness.asked == 1
    with pytest.raises(D3POError, match=r"scorer 'redness': .* answered 400"):
        _judge(in_shards, 1)
    assert redness.asked == 2
    redness.broken = False
    assert _judge(in_shards, 1).num_judgements == sum(redness.answered) == IMAGES


def test_server_can_be_left_alone_while_the_model_samples(in_shards: CampaignConfig, redness: Redness) -> None:
    values = in_shards.model_dump()
    values["scoring"]["while_sampling"] = False
    config = load_config(values, "test")
    _sample(config, 1)
    assert redness.asked == 0
    assert _judge(config, 1).num_judgements == IMAGES


@pytest.mark.parametrize(
    ("gpu", "expected"), [(True, ["jpeg_compressibility", "redness"]), (False, ["redness"])], ids=["gpu", "cpu"]
)
def test_asked_early_is_who_takes_nothing_from_the_sampling(
    gpu: bool, expected: list[str], config: CampaignConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorers = ["jpeg_compressibility", "clip_score", "redness", "own.module:function", "redness"]
    values = config.model_dump() | {"judge": {"scorers": scorers}}
    values["model"]["device"] = "auto"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert shard_scorers(load_config(values, "test")) == expected


@pytest.mark.parametrize("scorers", [["brightness", "jpeg_compressibility"], ["clip_score"], ["clip_score", "redness"]])
def test_round_scored_beside_a_gpu_is_judged_as_one_scored_afterwards(
    scorers: list[str], in_shards: CampaignConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = in_shards.model_dump()
    values["judge"]["scorers"] = scorers
    config = load_config(values, "test")
    score_shard, scored = scoring.score_shard, []

    def noted(*arguments: Any) -> shards.ShardScores:
        scored.append(score_shard(*arguments))
        return scored[-1]

    with monkeypatch.context() as patch:
        for module in (scoring, shards):
            patch.setattr(module, "device_type", lambda device: "cuda")
        patch.setattr(scoring, "score_shard", noted)
        sampling_that(patch, lambda: wait_until(lambda: len(scored) == SHARDS))
        _sample(config, 1)
        _judge(config, 1)
    assert len(scored) == SHARDS, "the judge scored a shard again"
    found = judged(config)
    _judge(config, 1)
    assert judged(config) == found


def test_model_on_the_processors_is_left_alone_with_them(in_shards: CampaignConfig) -> None:
    values = in_shards.model_dump()
    values["judge"]["scorers"] = ["brightness"]
    config = load_config(values, "test")
    _sample(config, 1)
    assert scored_early(config, round_shards(config, 1)) == {}
    assert _judge(config, 1).num_judgements == IMAGES
