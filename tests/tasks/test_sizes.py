"""A campaign whose groups have several sizes and whose guidance leads away from a text: its stages, and all again."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from d3po.flows.commands.line import app
from d3po.tasks.judging import _derive, _judge
from d3po.tasks.sampling import _sample
from d3po.tasks.training import _train
from d3po_core.config import CampaignConfig
from d3po_core.config_values import load_config
from d3po_core.models.loaded import loaded_policy
from d3po_core.reproducing.regenerate import regenerate, training_batches
from d3po_core.reproducing.replay import replay_round
from d3po_core.sampling.job import round_shards
from d3po_core.store.campaign import begin_round, open_campaign
from d3po_core.store.stages import checkpoint_path
from d3po_core.store.tables import SCHEMAS, joined, partition, read_rows
from tests.tasks.conftest import evaluate_and_publish, settings_in

SIZES = [(64, 96), (96, 64), (64, 64)]


@pytest.fixture(scope="module")
def sized(tmp_path_factory: pytest.TempPathFactory) -> CampaignConfig:
    """A finished round, whose sampling and training were killed and went on."""
    folder = tmp_path_factory.mktemp("sized")
    values = settings_in(folder) | {"campaign": "sized"}
    values["sample"] |= {"sizes": SIZES, "guidance_scale": 2.0, "negative_prompt": "a black circle"}
    values["evaluate"] |= {"height": 32, "width": 64}
    config = load_config(values, "test")
    open_campaign(config)
    for number in range(2):
        begin_round(config, number)
        if number:
            _sample(config, number)
            for path in (config.folder / "staging" / "round=1").glob("shard-0001*"):
                path.unlink()
            for work in (_sample, _judge, _derive, _train):
                work(config, number)
        evaluate_and_publish(config, number)
    return config


def rows(config: CampaignConfig, table: str, number: int = 1) -> list[dict[str, Any]]:
    return read_rows(partition(config.folder, table, number) / "part.parquet")


def pixels(config: CampaignConfig, row: dict[str, Any]) -> tuple[int, int]:
    width, height = Image.open(config.folder / row["image_path"]).size
    return height, width


def test_tables_say_the_size_of_every_image(sized: CampaignConfig) -> None:
    samples, held_out = rows(sized, "samples"), rows(sized, "evaluations")
    assert all((row["height"], row["width"]) == pixels(sized, row) for row in [*samples, *held_out])
    assert {(row["height"], row["width"]) for row in samples} == set(SIZES)
    assert {(row["height"], row["width"]) for row in held_out} == {(32, 64)}


def test_shards_are_whole_groups_of_one_size(sized: CampaignConfig) -> None:
    by_shard: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows(sized, "samples"):
        by_shard[row["trajectory_path"]].append(row)
    assert len(by_shard) == len(round_shards(sized, 1)) >= 3
    groups: list[str] = []
    for path, members in by_shard.items():
        ((height, width),) = {(row["height"], row["width"]) for row in members}
        assert load_file(sized.folder / path)["latents"].shape[2:] == (4, height // 8, width // 8)
        assert len(members) % sized.sample.group_size == 0
        groups += dict.fromkeys(row["group_id"] for row in members)
    assert sorted(groups) == [f"r1-g{index}" for index in range(5)]


def test_images_and_the_round_come_out_the_same_again(sized: CampaignConfig, tmp_path: Path) -> None:
    """Also when a shard's trajectories are gone, which are then drawn anew."""
    policy = loaded_policy(sized)
    chosen = {(row["height"], row["width"]): row["sample_id"] for row in rows(sized, "samples")}
    for sample_id in (*chosen.values(), "r1-e7"):
        assert regenerate(sized.folder, sample_id, policy).same_bytes
    batches = training_batches(sized.folder, 1)
    gone = sized.folder / next(iter(batches))
    kept = gone.rename(tmp_path / gone.name)
    try:
        replay = replay_round(sized.folder, 1, policy)
    finally:
        kept.rename(gone)
    assert replay.identical
    assert replay.num_updates == 2
    assert len(replay.sampled_again) == 1
    assert replay.images_identical == replay.images_compared > 0


def test_show_tells_an_images_size(sized: CampaignConfig) -> None:
    row = rows(sized, "samples")[0]
    done = CliRunner().invoke(app, ["show", row["sample_id"], "--campaign", str(sized.folder)])
    assert done.exit_code == 0, done.output
    assert f"size        {row['height']} x {row['width']} pixels (height x width)" in done.output
    assert "sample.negative_prompt = 'a black circle'" in done.output


def test_the_update_saw_all_pairs_of_all_sizes(sized: CampaignConfig) -> None:
    pairs = {row["group_id"] for row in rows(sized, "preferences")}
    updates = rows(sized, "updates")
    assert sum(update["num_pairs"] for update in updates) == len(rows(sized, "preferences"))
    assert {row["group_id"] for row in rows(sized, "samples")} >= pairs
    assert all(np.isfinite(update["loss"]) and update["grad_norm"] > 0 for update in updates)
    assert (sized.folder / str(checkpoint_path(1))).is_dir()


def test_a_shard_of_an_earlier_version_joins_those_of_today(sized: CampaignConfig) -> None:
    path = partition(sized.folder, "samples", 1) / "part.parquet"
    today = pq.ParquetFile(path).read()
    both = joined("samples", [today.drop_columns(["height", "width"]), today])
    assert both.schema.names == SCHEMAS["samples"].names
    assert both["height"].null_count == len(today)
