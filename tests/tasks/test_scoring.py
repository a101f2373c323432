"""A round judged by a learned scorer and a server together, mixed by weights, on the embedded model."""

import base64
import io
import itertools
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from d3po_core.config import CampaignConfig, load_config
from d3po_core.errors import D3POError
from d3po_core.tables import partition, read_rows
from tasks.evaluating import _evaluate
from tasks.judging import _derive, _judge
from tasks.publishing import check_campaign
from tasks.sampling import _sample
from tests.core.small_scorers import clip_folder


@pytest.fixture
def redness(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """URL of a server that scores the mean of red."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            images = [np.asarray(Image.open(io.BytesIO(base64.b64decode(png)))) for png in content["images"]]
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"scores": [float(image[..., 0].mean()) for image in images]}).encode())

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()
    server.server_close()


@pytest.fixture
def config(tmp_path: Path, redness: str) -> CampaignConfig:
    clip_folder(tmp_path / "clip")
    values = {
        "campaign": "mixed",
        "runs_dir": str(tmp_path / "runs"),
        "model": {"device": "cpu", "lora_rank": 4},
        "sample": {"groups_per_round": 3, "group_size": 3, "num_steps": 2},
        "judge": {
            "scorers": ["clip_score", "redness"], "combine": "weighted", "scorer_weights": {"redness": 2},
        },
        "scoring": {"models": {"clip_score": str(tmp_path / "clip"), "redness": redness}, "batch_size": 4},
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
