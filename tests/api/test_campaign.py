"""The Python API for notebooks: it reads what the tables hold, and a loaded checkpoint draws the same images."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import d3po
from d3po_core.config import TrainConfig
from d3po_core.evaluation.job import EVALUATE, held_out_path, held_out_seeds
from d3po_core.models.checkpoint import save_checkpoint
from d3po_core.models.loaded import loaded_policy
from d3po_core.paths import PROJECT_ROOT
from d3po_core.seeds import gaussian
from d3po_core.store.campaign import round_config
from d3po_core.store.stages import checkpoint_path
from d3po_core.store.tables import partition, read_rows, table_from_rows, write_table
from d3po_core.training.optimizer import make_optimizer
from tests.core.sampling.drawing import stir_lora
from tests.core.small_campaign import DOWN, UP, write_campaign


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_campaign(folder / "runs")
    return folder


@pytest.fixture(autouse=True)
def _own_data(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("D3PO_DATA", str(data))


def test_rounds_are_a_frame_with_one_row_each() -> None:
    rounds = d3po.open("small").rounds
    assert list(rounds.index) == [0, 1, 2, 3, 4]
    assert rounds["eval_score_mean"].tolist() == pytest.approx(
        [np.mean([*UP[n], *DOWN[n]]) for n in range(5)]
    )  # fmt: skip


def test_images_are_found_by_round_prompt_and_kind() -> None:
    campaign = d3po.open("small")
    held_out = campaign.images(round="latest", held_out=True)
    assert dict(held_out["score"]) == {f"r4-e{k}": (*UP[4], *DOWN[4])[k] for k in range(4)}
    assert list(campaign.images(round=2, prompt="of g1").index) == ["r2-g1-m0", "r2-g1-m1", "r2-g1-m2"]
    path = campaign.images(round=2).loc["r2-g1-m0", "path"]
    assert np.array_equal(np.asarray(campaign.image("r2-g1-m0")), np.asarray(Image.open(path)))


def test_compare_gives_means_and_paired_differences() -> None:
    table = d3po.open("small").compare(0, 3)
    assert table.loc[("prompt_alignment", 3), "difference"] == pytest.approx(
        np.mean([*UP[3], *DOWN[3]]) - np.mean([*UP[0], *DOWN[0]])
    )
    assert pd.isna(table.loc[("prompt_alignment", 0), "difference"])


def test_sql_reads_and_never_writes() -> None:
    campaign = d3po.open("small")
    assert campaign.sql("SELECT count(*) AS n FROM samples")["n"].tolist() == [24]
    with pytest.raises(d3po.D3POError, match="expected one SELECT"):
        campaign.sql("DROP TABLE samples")


def test_what_is_not_there_is_one_line() -> None:
    with pytest.raises(d3po.D3POError, match=r"campaign 'none' is not in .*; there are small"):
        d3po.open("none")
    campaign = d3po.open("small")
    with pytest.raises(d3po.D3POError, match="'9' is no finished round"):
        campaign.load(9)
    with pytest.raises(d3po.D3POError, match="'r9-g0-m0' is not in campaign 'small'"):
        campaign.image("r9-g0-m0")
    with pytest.raises(d3po.D3POError, match="only round 4 was named"):
        campaign.compare("latest")


def test_all_campaigns_are_a_frame_and_a_broken_one_has_a_problem(data: Path) -> None:
    shutil.copytree(data / "runs" / "small", data / "runs" / "broken")
    (data / "runs" / "broken" / "rounds" / "round=4" / "part.parquet").write_text("no table")
    try:
        found = d3po.campaigns()
    finally:
        shutil.rmtree(data / "runs" / "broken")
    assert found.loc["small", "rounds"] == 4
    assert found.loc["small", "score"] == pytest.approx(0.625)
    assert found.loc["small", "base"] == pytest.approx(0.25)
    assert "part.parquet" in found.loc["broken", "problem"]


@pytest.fixture(scope="module")
def trained(data: Path) -> Path:
    """The campaign with a checkpoint in round 4, and the held-out images that our own sampler draws with it."""
    folder = data / "runs" / "small"
    config = round_config(folder, 4)
    config = config.model_copy(update={"runs_dir": str(data / "runs"), "evaluate": config.evaluate.model_copy(
        update={"images_per_prompt": 1, "max_prompts": 3, "drift_images": 0})})  # fmt: skip
    policy = loaded_policy(config)
    stir_lora(policy, seed=5)
    save_checkpoint(folder / str(checkpoint_path(4)), policy, make_optimizer(policy, TrainConfig()), {})
    (row,) = read_rows(partition(folder, "rounds", 4) / "part.parquet")
    digest = json.loads((folder / str(checkpoint_path(4)) / "checkpoint.json").read_text())["lora_sha256"]
    write_table(folder, "rounds", 4, table_from_rows("rounds", [row | {"lora_sha256": digest}]))
    EVALUATE.alone(config, 4, lambda _: None)
    return folder


def test_a_loaded_checkpoint_draws_the_campaigns_own_images(trained: Path) -> None:
    campaign = d3po.open("small")
    sample = campaign.config.sample
    pipe = campaign.load("latest")
    pipe.set_progress_bar_config(disable=True)
    for index, seed in enumerate(held_out_seeds(campaign.config)[::2][:3]):
        drawn = pipe(
            seed.prompt, num_inference_steps=sample.num_steps, guidance_scale=sample.guidance_scale,
            eta=1.0 if sample.eta is None else sample.eta, latents=gaussian(seed.initial_seed, 1, 4, 8, 8),
            generator=torch.Generator().manual_seed(seed.noise_seed),
        ).images[0]  # fmt: skip
        stored = np.asarray(Image.open(trained / held_out_path(4, index)), dtype=int)
        assert np.abs(np.asarray(drawn, dtype=int) - stored).max() <= 1
    base = campaign.load("base")
    base.set_progress_bar_config(disable=True)
    other = base(seed.prompt, num_inference_steps=sample.num_steps, guidance_scale=sample.guidance_scale, eta=1.0,
                 latents=gaussian(seed.initial_seed, 1, 4, 8, 8),
                 generator=torch.Generator().manual_seed(seed.noise_seed)).images[0]  # fmt: skip
    assert np.abs(np.asarray(other, dtype=int) - stored).max() > 1


def test_a_checkpoint_that_changed_is_not_loaded(trained: Path) -> None:
    file = trained / str(checkpoint_path(4)) / "pytorch_lora_weights.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        with pytest.raises(d3po.D3POError, match="its weights changed since training"):
            d3po.open("small").load("latest")
    finally:
        file.write_bytes(whole)


def test_the_example_notebook_runs(trained: Path) -> None:
    cells = json.loads((PROJECT_ROOT / "docs/examples/notebook.ipynb").read_text())["cells"]
    program = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    program = program.replace('"shapes"', '"small"').replace("num_inference_steps=10", "num_inference_steps=2")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(cell.get("outputs", []) == [] for cell in cells)


def test_a_campaign_is_opened_by_its_folder_as_text_or_path(data: Path) -> None:
    for name in (data / "runs/small", str(data / "runs/small"), Path("small")):
        assert d3po.open(name).folder == data / "runs/small"


@pytest.mark.parametrize("name", [None, 5, b"small", ["small"], "/" + "x" * 300])
def test_what_names_no_campaign_is_one_line(name: Any) -> None:
    with pytest.raises(d3po.D3POError) as caught:
        d3po.open(name)
    assert "\n" not in str(caught.value)


def test_values_of_the_wrong_kind_are_one_line(data: Path) -> None:
    campaign = d3po.open("small")
    for ask in (
        lambda: campaign.images(round="²"), lambda: campaign.images(held_out="yes"), lambda: campaign.image(5),
        lambda: campaign.story(5), lambda: campaign.story(None), lambda: campaign.sql(5), lambda: campaign.sql(None),
    ):  # fmt: skip
        with pytest.raises(d3po.D3POError) as caught:
            ask()
        assert "\n" not in str(caught.value)
    assert len(campaign.images(prompt=5)) == 0


def test_a_campaign_that_is_deleted_or_damaged_while_it_is_open_says_so(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(data / "runs/small", tmp_path / "runs/open")
    monkeypatch.setenv("D3PO_DATA", str(tmp_path))
    campaign = d3po.open("open")
    campaign.images().loc["r2-g1-m0", "path"].write_text("no image")
    with pytest.raises(d3po.D3POError, match=r"r2-g1-m0\.png: cannot be read"):
        campaign.image("r2-g1-m0")
    shutil.rmtree(campaign.folder)
    with pytest.raises(d3po.D3POError, match=f"its folder {campaign.folder} is gone"):
        campaign.rounds  # noqa: B018
    with pytest.raises(d3po.D3POError, match=f"its folder {campaign.folder} is gone"):
        campaign.images()


def test_importing_d3po_is_quick() -> None:
    script = "import d3po, sys; print(sorted({'torch', 'pandas', 'duckdb', 'prefect', 'mlflow'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.strip() == "[]"
