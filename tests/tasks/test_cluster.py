"""A cluster of several nodes: what is lost, what joins, and what is refused in one line."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from d3po_core.paths import PROJECT_ROOT
from d3po_core.processes.crew import full_store
from d3po_core.processes.parcel import digests

SQUARES = [0, 1, 4, 9, 16, 25]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the script of checks saw."""
    folder = tmp_path_factory.mktemp("cluster")
    done = subprocess.run(
        [sys.executable, "-m", "tests.tasks.cluster_checks", str(folder)], cwd=PROJECT_ROOT, capture_output=True,
        text=True, timeout=280, env={**os.environ, "PYTHONPATH": str(PROJECT_ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    content: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return content


@pytest.mark.timeout(300)
def test_a_cluster_smaller_than_asked_for_works_with_what_it_has(found: dict[str, Any]) -> None:
    assert found["smaller, sampling"] == SQUARES
    assert found["smaller, training"] == 1


def test_a_cluster_below_the_fewest_processes_is_one_line(found: dict[str, Any]) -> None:
    kind, message = found["too small"]
    assert kind == "RankError"
    assert message.startswith(
        "1 of 2 workers are ready after 3 s (compute.start_seconds), of a cluster with room for 1"
    )
    assert "expected at least 2" in message


def test_a_node_that_joins_is_used_and_one_that_goes_loses_only_its_items(found: dict[str, Any]) -> None:
    assert found["changed, sampling"] == SQUARES
    assert found["changed, told"] == 6
    assert found["changed, workers"] == 2


def test_training_goes_on_with_those_that_remain(found: dict[str, Any]) -> None:
    assert found["lost, training"] == 1


def test_other_versions_on_a_node_are_one_line(found: dict[str, Any]) -> None:
    kind, message = found["versions"]
    assert kind == "D3POError"
    assert "node 127.0.0.1 has diffusers 0.0.1 (here " in message


@pytest.mark.parametrize("way", ["sending", "returning"])
def test_a_file_without_room_in_memory_and_on_the_disk_is_one_line(found: dict[str, Any], way: str) -> None:
    kind, message, seconds = found[f"full, {way}"]
    assert kind == "RankError"
    assert "Ray's object store is full" in message
    assert "ray start --object-store-memory" in message
    assert "\n" not in message
    assert seconds < 100


def test_models_that_a_node_lacks_are_sent_also_if_they_have_one_name(found: dict[str, Any]) -> None:
    assert found["models lacking"] == [["weights", "index"]]


def test_a_model_with_other_files_on_a_node_is_one_line(found: dict[str, Any]) -> None:
    kind, message = found["model differs"]
    assert kind == "D3POError"
    assert message.startswith("node 127.0.0.1: ")
    assert "/models-here/second/model has other files than here" in message


def test_no_cluster_at_the_address_is_one_line(found: dict[str, Any]) -> None:
    kind, message = found["nobody"]
    assert kind == "D3POError"
    assert message.startswith("compute.address is '127.0.0.1:1': no Ray cluster can be reached there")
    assert "\n" not in message


def test_a_models_files_are_known_by_their_content(tmp_path: Path) -> None:
    (tmp_path / "model" / "unet").mkdir(parents=True)
    for name in ("model_index.json", "unet/config.json", ".cache"):
        (tmp_path / "model" / name).write_text(name)
    before = digests(tmp_path / "model")
    assert list(before) == ["model_index.json", "unet/config.json"]
    (tmp_path / "model" / "unet" / "config.json").write_text("other")
    assert digests(tmp_path / "model") != before
    assert list(digests(tmp_path / "model" / "model_index.json")) == ["model_index.json"]


def test_a_full_object_store_is_told_in_one_line() -> None:
    ray_error = type("ObjectStoreFullError", (Exception,), {})(
        "Failed to put object in object store because it is full"
    )
    told = full_store(ray_error)
    assert told is not None
    assert "Ray's object store is full" in told
    assert "\n" not in told
    assert full_store(ValueError("something else")) is None
