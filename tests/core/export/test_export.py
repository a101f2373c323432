"""What leaves the house: a dataset that trainers of Diffusion-DPO read, a LoRA with its card, and nothing private."""

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save

from d3po_core.config import CampaignConfig
from d3po_core.config_values import load_config
from d3po_core.errors import D3POError
from d3po_core.export.cards import hub_model, public_config
from d3po_core.export.lora import export_lora
from d3po_core.export.preferences import COLUMNS, export_preferences
from d3po_core.models.loaded import load_policy
from d3po_core.models.model_files import with_model_defaults
from d3po_core.store.campaign import begin_round
from d3po_core.store.files import new_folder
from d3po_core.store.tables import partition, read_rows, table_from_rows, write_table
from tests.core.models.tiny_flow_models import FLOW_NAMES, tiny_flow_model
from tests.core.models.tiny_models import tiny_model
from tests.core.small_campaign import small_config, write_campaign


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_campaign(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def dataset(campaign: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "preferences"
    export_preferences(campaign, folder)
    return folder


def rows_of(dataset: Path) -> list[dict[str, Any]]:
    return [row for file in sorted((dataset / "data").iterdir()) for row in pq.read_table(file).to_pylist()]


def header_of(folder: Path) -> dict[str, Any]:
    _, header, body = (folder / "README.md").read_text().split("---\n", 2)
    assert body.startswith("\n# ")
    header = yaml.safe_load(header)
    assert isinstance(header, dict)
    return header


def test_every_preference_is_a_row_and_ties_are_none(campaign: Path, dataset: Path) -> None:
    stored = {row["pair_id"]: row for n in (1, 2, 3, 4) for row in read_rows(
        partition(campaign, "preferences", n) / "part.parquet")}  # fmt: skip
    rows = rows_of(dataset)
    assert sorted(row["pair_id"] for row in rows) == sorted(stored)
    for row in rows:
        pair = stored[row["pair_id"]]
        assert row["best_image_uid"] == pair["winner_id"]
        assert {row["image_0_uid"], row["image_1_uid"]} == {pair["winner_id"], pair["loser_id"]}
        assert row["weight"] == pair["weight"]


def test_label_is_one_for_the_image_of_the_winner_whose_bytes_are_its_file(campaign: Path, dataset: Path) -> None:
    for row in rows_of(dataset):
        for place in (0, 1):
            uid = row[f"image_{place}_uid"]
            assert row[f"label_{place}"] == (1.0 if uid == row["best_image_uid"] else 0.0)
            assert row[f"jpg_{place}"] == (campaign / f"images/round={row['round']}/{uid}.png").read_bytes()
            assert Image.open(io.BytesIO(row[f"jpg_{place}"])).size == (8, 8)


def test_winner_stands_first_about_as_often_as_second(tmp_path: Path) -> None:
    campaign = write_campaign(tmp_path / "runs")
    (first,) = (read_rows(partition(campaign, "preferences", 1) / "part.parquet"))[:1]
    many = [first | {"pair_id": f"pair-{k}"} for k in range(400)]
    write_table(campaign, "preferences", 1, table_from_rows("preferences", many))
    export_preferences(campaign, tmp_path / "export")
    labels = [row["label_0"] for row in rows_of(tmp_path / "export") if row["round"] == 1]
    # Four standard deviations of 400 throws of a fair coin.
    assert len(labels) == 400
    assert abs(sum(labels) - 200) < 40


def test_export_is_the_same_twice(campaign: Path, dataset: Path, tmp_path: Path) -> None:
    export_preferences(campaign, tmp_path / "again")
    for file in ("README.md", "data/train-00000-of-00001.parquet"):
        assert (tmp_path / "again" / file).read_bytes() == (dataset / file).read_bytes()


def test_columns_that_trainers_read_have_the_types_of_pick_a_pic(dataset: Path) -> None:
    schema = pq.read_schema(dataset / "data" / "train-00000-of-00001.parquet")
    expected = {"jpg_0": pa.binary(), "jpg_1": pa.binary(), "label_0": pa.float64(), "label_1": pa.float64(),
                "caption": pa.string(), "are_different": pa.bool_(), "has_label": pa.bool_(),
                "best_image_uid": pa.string(), "ranking_id": pa.int64()}  # fmt: skip
    assert {name: schema.field(name).type for name in expected} == expected


def test_card_and_files_name_the_same_features(dataset: Path) -> None:
    schema = pq.read_schema(dataset / "data" / "train-00000-of-00001.parquet")
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert list(features) == schema.names == list(COLUMNS)
    header = header_of(dataset)
    default, images = header["dataset_info"]
    assert default["features"] == [{"name": name, "dtype": kind["dtype"]} for name, kind in features.items()]
    decoded = {feature["name"]: feature["dtype"] for feature in images["features"]}
    assert decoded.pop("jpg_0") == decoded.pop("jpg_1") == "image"
    assert decoded.items() <= {name: kind["dtype"] for name, kind in features.items()}.items()
    assert [config["config_name"] for config in header["configs"]] == ["default", "images"]
    assert default["splits"][0]["num_examples"] == len(rows_of(dataset))
    assert default["download_size"] == sum(file.stat().st_size for file in (dataset / "data").iterdir())


@settings(max_examples=25)
@given(shard_bytes=st.integers(1, 3000))
def test_files_are_bounded_and_together_hold_all(
    campaign: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory, shard_bytes: int
) -> None:
    folder = tmp_path_factory.mktemp("shards") / "export"
    export_preferences(campaign, folder, shard_bytes)
    files = sorted((folder / "data").iterdir())
    assert [file.name for file in files] == [f"train-{n:05d}-of-{len(files):05d}.parquet" for n in range(len(files))]
    assert rows_of(folder) == rows_of(dataset)
    for file in files:
        rows = pq.read_table(file).to_pylist()
        assert len(rows) == 1 or sum(len(row["jpg_0"]) + len(row["jpg_1"]) for row in rows) <= shard_bytes


def test_names_of_raters_stay_at_home(dataset: Path) -> None:
    text = (dataset / "README.md").read_text() + str([
        {name: value for name, value in row.items() if not name.startswith("jpg")} for row in rows_of(dataset)
    ])  # fmt: skip
    assert "people_for" in text
    assert not any(f"'{rater}'" in text or f" {rater} " in text for rater in ("ann", "bob", "cat"))


def test_folder_with_something_in_it_is_not_overwritten(campaign: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("ten years")
    for export in (export_preferences, export_lora_of_four):
        with pytest.raises(D3POError, match="mine: is not empty; nothing is overwritten, name a new folder"):
            export(campaign, tmp_path / "mine")
        with pytest.raises(D3POError, match="is a file"):
            export(campaign, tmp_path / "mine" / "thesis.txt")
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "thesis.txt"]
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "ten years"


def test_empty_folder_is_used_and_a_failure_leaves_nothing(campaign: Path, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    export_preferences(campaign, tmp_path / "new")

    def write_half() -> None:
        with new_folder(tmp_path / "broken") as folder:
            (folder / "half").write_text("")
            raise KeyError

    with pytest.raises(KeyError):
        write_half()
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_lost_image_and_missing_preferences_are_told(campaign: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(campaign, tmp_path / "small"))
    (copy / "images/round=2/r2-g0-m1.png").unlink()
    with pytest.raises(D3POError, match=r"1 images of the pairs are gone \(images/round=2/r2-g0-m1.png first\)"):
        export_preferences(copy, tmp_path / "export")
    shutil.rmtree(copy / "preferences")
    with pytest.raises(D3POError, match="campaign 'small' has no preferences yet"):
        export_preferences(copy, tmp_path / "export")


WEIGHTS = save({f"unet.mid.attn2.to_k.lora_{half}.weight": torch.ones(shape) for half, shape in
                {"A": (2, 768), "B": (8, 2)}.items()})  # fmt: skip


def give_lora(campaign: Path, number: int, content: bytes = WEIGHTS) -> None:
    """A file in the LoRA's place, and its digest in the round's row."""
    import hashlib

    folder = campaign / f"checkpoints/round={number}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "pytorch_lora_weights.safetensors").write_bytes(content)
    (row,) = read_rows(partition(campaign, "rounds", number) / "part.parquet")
    row["lora_sha256"] = hashlib.sha256(content).hexdigest()
    write_table(campaign, "rounds", number, table_from_rows("rounds", [row]))


def export_lora_of_four(campaign: Path, output: Path) -> int:
    give_lora(campaign, 4)
    return export_lora(campaign, output, "latest")


def test_lora_folder_has_weights_card_scores_and_configuration(campaign: Path, tmp_path: Path) -> None:
    assert export_lora_of_four(campaign, tmp_path / "lora") == 4
    assert sorted(path.name for path in (tmp_path / "lora").iterdir()) == [
        "README.md", "d3po.json", "kohya.safetensors", "pytorch_lora_weights.safetensors",
    ]  # fmt: skip
    assert (tmp_path / "lora" / "pytorch_lora_weights.safetensors").read_bytes() == WEIGHTS
    kohya = load_file(tmp_path / "lora" / "kohya.safetensors")
    assert set(kohya) == {
        f"lora_unet_mid_attn2_to_k.{part}" for part in ("alpha", "lora_down.weight", "lora_up.weight")
    }
    with safe_open(tmp_path / "lora" / "kohya.safetensors", "pt") as file:
        assert file.metadata()["ss_base_model_version"] == "sd_v1"
    card = (tmp_path / "lora" / "README.md").read_text()
    assert "| prompt_alignment | 0.250 [0.150, 0.350] | 0.625 [0.525, 0.725] |" in card
    header = header_of(tmp_path / "lora")
    assert (header["library_name"], header["pipeline_tag"]) == ("diffusers", "text-to-image")
    assert "base_model" not in header
    details = json.loads((tmp_path / "lora" / "d3po.json").read_text())
    assert details["round"] == 4
    assert load_config(details["config"], "d3po.json").sample == small_config(tmp_path).sample


def test_card_of_a_hub_model_names_it(campaign: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(campaign, tmp_path / "runs" / "hub"))
    give_lora(copy, 2)
    (copy / "stages/round=2/config.json").unlink()
    config = load_config(
        {"campaign": "hub", "runs_dir": str(tmp_path / "runs"), "model": {"path": "someone/model-1"}}, "t"
    )
    begin_round(config, 2)
    assert export_lora(copy, tmp_path / "lora", "2") == 2
    assert header_of(tmp_path / "lora")["base_model"] == "someone/model-1"
    assert 'from_pretrained("someone/model-1"' in (tmp_path / "lora" / "README.md").read_text()


def test_lora_that_was_changed_or_lost_is_not_exported(campaign: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(campaign, tmp_path / "small"))
    give_lora(copy, 3)
    weights = copy / "checkpoints/round=3/pytorch_lora_weights.safetensors"
    weights.write_bytes(b"other weights")
    with pytest.raises(D3POError, match="was changed since round 3 was trained"):
        export_lora(copy, tmp_path / "lora", "3")
    weights.unlink()
    with pytest.raises(D3POError, match="is gone; restore it, or export another round"):
        export_lora(copy, tmp_path / "lora", "3")
    with pytest.raises(D3POError, match="'7' is no finished round"):
        export_lora(copy, tmp_path / "lora", "7")
    assert not (tmp_path / "lora").exists()


def test_paths_of_this_machine_are_not_shown_to_others(tmp_path: Path) -> None:
    values = {"runs_dir": str(tmp_path), "sample": {"prompts": "~/private/prompts.txt"},
              "model": {"path": str(tmp_path / "secret" / "sd"), "single_file_config": str(tmp_path / "secret" / "v1")},
              "judge": {"scorers": ["pickscore", "taste"]},
              "scoring": {"models": {"pickscore": str(tmp_path / "clip"), "taste": "http://judge:9000/score"}},
              }  # fmt: skip
    shown = public_config(load_config(values, "test"))
    assert "runs_dir" not in shown
    assert (shown["model"]["path"], shown["sample"]["prompts"]) == ("sd", "prompts.txt")
    assert shown["model"]["single_file_config"] == "v1"
    assert shown["scoring"]["models"] == {"pickscore": "clip", "taste": "http://judge:9000/score"}
    assert str(tmp_path) not in json.dumps(shown)
    assert shown["evaluate"]["prompts"] == CampaignConfig().evaluate.prompts
    assert hub_model(CampaignConfig()) is None


SIZED_FLOW = {"height": 64, "width": 32, "guidance_scale": 3.0, "negative_prompt": "a cross"}
SIZED = {"height": 32, "width": 24, "guidance_scale": 3.0, "negative_prompt": 'a "blue" cross', "long_prompts": "chunk"}


@pytest.mark.parametrize(
    ("name", "sample"), [("sd", SIZED), ("sdxl", {"sizes": [[32, 24], [16, 16]]}), ("sd3", {}), ("sana", SIZED_FLOW),
                         ("klein-base", SIZED_FLOW)],
)  # fmt: skip
def test_lines_of_the_card_run_and_draw_an_image(
    campaign: Path, tmp_path: Path, name: str, sample: dict[str, Any]
) -> None:
    copy = Path(shutil.copytree(campaign, tmp_path / "runs" / "family"))
    base = (tiny_flow_model if name in FLOW_NAMES else tiny_model)(name, tmp_path / name)
    values = {"campaign": "family", "runs_dir": str(tmp_path / "runs"), "sample": {"num_steps": 2, **sample},
              "model": {"path": str(base), "lora_rank": 2, "device": "cpu"}}  # fmt: skip
    config = load_config(values, "test")
    file = load_policy(with_model_defaults(config).model, seed=0).weights.save(tmp_path)
    give_lora(copy, 2, file.read_bytes())
    (copy / "stages/round=2/config.json").unlink()
    begin_round(config, 2)
    export_lora(copy, tmp_path / "lora", "2")
    card = (tmp_path / "lora" / "README.md").read_text()
    (lines,) = re.findall(r"```python\n(.*?)```", card, re.S)
    names: dict[str, Any] = {}
    exec(lines.replace(f'"{name}"', repr(str(base))).replace('"FOLDER"', repr(str(tmp_path / "lora"))), names)
    size = config.sample.image_sizes[0] or (16, 16)
    assert names["image"].size == size[::-1]
    assert ("read in windows of 75" in card) == (config.sample.long_prompts == "chunk")
    assert ("also trained at 16 x 16" in card) == bool(config.sample.sizes)
    assert names["pipe"].get_active_adapters()
