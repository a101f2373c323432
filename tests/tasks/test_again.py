"""Made again: images, trained rounds and exported LoRAs of a campaign that the stages of a run made."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from d3po_core.config import CampaignConfig
from d3po_core.errors import D3POError
from d3po_core.export.lora import export_lora
from d3po_core.models import loaded
from d3po_core.models.loaded import load_policy, loaded_policy
from d3po_core.models.policy import Policy
from d3po_core.models.weights import weights_sha256
from d3po_core.paths import PROJECT_ROOT
from d3po_core.reproducing.regenerate import batch_of, largest_difference, regenerate
from d3po_core.reproducing.replay import replay_round
from d3po_core.sampling.rollout import draw_images
from d3po_core.store.images import load_png, save_png
from d3po_core.store.prune import apply_prune, plan_prune
from d3po_core.store.tables import partition, read_rows, table_from_rows, write_table
from tests.tasks.conftest import TRAIN


def forget_digests(campaign: Path, number: int) -> None:
    """As of a round that an earlier version made: its files may be anything."""
    for path in (campaign / "stages" / f"round={number}").glob("*.files"):
        path.unlink()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("sample_id", ["r1-g0-m0", "r1-g3-m2", "r2-g1-m1", "r2-g4-m2", "r0-e3", "r2-e0", "r2-e11"])
def test_regenerated_image_is_the_stored_file_byte_for_byte(campaign: Path, model: Policy, sample_id: str) -> None:
    again = regenerate(campaign, sample_id, model)
    assert again.same_bytes
    assert again.largest_difference == 0
    assert np.array_equal(again.image, load_png(again.stored))
    assert again.made_on == (None if sample_id.startswith("r0") else again.computed_on)


def test_image_drawn_alone_differs_by_rounding_only(campaign: Path, config: CampaignConfig, model: Policy) -> None:
    for sample_id in ("r2-g0-m0", "r2-g4-m1"):
        batch = batch_of(campaign, sample_id)
        row = batch.sample_ids.index(sample_id)
        regenerate(campaign, sample_id, model)  # leaves the policy with the batch's checkpoint
        (alone,) = draw_images(model, config.sample, [batch.seeds[row]], batch.latent_dtype)[1]
        difference = largest_difference(alone, campaign / batch.image_paths[row])
        assert difference is not None
        assert difference <= 2


def test_image_comes_from_the_checkpoint_before_its_round(campaign: Path, model: Policy) -> None:
    assert batch_of(campaign, "r2-g0-m0").checkpoint_round == 1
    assert batch_of(campaign, "r2-e0").checkpoint_round == 2
    shutil.rmtree(campaign / "checkpoints/round=1")
    assert regenerate(campaign, "r1-g0-m0", model).same_bytes  # the base model drew it
    with pytest.raises(D3POError, match=r"checkpoints/round=1: cannot be read"):
        regenerate(campaign, "r2-g0-m0", model)


def test_tables_say_which_checkpoint_a_round_started_from(campaign: Path, model: Policy) -> None:
    rows = read_rows(partition(campaign, "samples", 2) / "part.parquet")
    from_base = [row | {"checkpoint": None} for row in rows]
    write_table(campaign, "samples", 2, table_from_rows("samples", from_base))
    forget_digests(campaign, 2)
    assert batch_of(campaign, "r2-g0-m0").checkpoint_round == 0
    assert not replay_round(campaign, 2, model).identical


def test_changed_and_lost_images_are_noticed(campaign: Path, model: Policy) -> None:
    path = campaign / "images/round=1/r1-g0-m0.png"
    image = load_png(path).copy()
    image[3, 4, 0] ^= 64
    save_png(image, path)
    again = regenerate(campaign, "r1-g0-m0", model)
    assert (again.same_bytes, again.largest_difference) == (False, 64)
    path.unlink()
    assert regenerate(campaign, "r1-g0-m0", model).largest_difference is None


def test_tables_that_do_not_fit_the_seeds_are_refused(campaign: Path, model: Policy) -> None:
    rows = read_rows(partition(campaign, "samples", 1) / "part.parquet")
    rows[4]["seed"] += 1
    write_table(campaign, "samples", 1, table_from_rows("samples", rows))
    forget_digests(campaign, 1)
    with pytest.raises(D3POError, match=rf"sample '{rows[4]['sample_id']}': its stored seed .* is not the one"):
        regenerate(campaign, "r1-g0-m0", model)


@pytest.mark.parametrize("number", [1, 2])
def test_replayed_round_gives_the_same_lora_and_writes_nothing(campaign: Path, model: Policy, number: int) -> None:
    before = contents(campaign)
    result = replay_round(campaign, number, model)
    assert result.identical
    assert result.sha256 == weights_sha256(campaign / f"checkpoints/round={number}")
    assert result.largest_difference == 0
    assert result.largest_move > 1e-4
    assert result.num_updates == 2
    assert result.sampled_again == ()
    assert contents(campaign) == before


def test_replay_after_pruning_samples_trajectories_anew(campaign: Path, model: Policy) -> None:
    plan = plan_prune(campaign)
    apply_prune(campaign, plan)
    assert not list(campaign.glob("trajectories/round=*/*"))
    result = replay_round(campaign, 2, model)
    assert len(result.sampled_again) == 3
    assert result.images_identical == result.images_compared == 15
    assert result.identical
    assert regenerate(campaign, "r2-g1-m0", model).same_bytes


def test_replay_from_other_preferences_gives_another_lora(campaign: Path, model: Policy) -> None:
    rows = read_rows(partition(campaign, "preferences", 2) / "part.parquet")
    turned = [row | {"winner_id": row["loser_id"], "loser_id": row["winner_id"]} for row in rows]
    write_table(campaign, "preferences", 2, table_from_rows("preferences", turned))
    forget_digests(campaign, 2)
    result = replay_round(campaign, 2, model)
    assert not result.identical
    assert result.largest_difference is not None
    assert result.largest_difference > 0.1 * result.largest_move


def test_replay_names_all_that_is_missing(campaign: Path, model: Policy) -> None:
    (campaign / "checkpoints/round=1/optimizer.safetensors").unlink()
    shutil.rmtree(campaign / "preferences/round=2")
    with pytest.raises(
        D3POError,
        match=r"preferences/round=2/part.parquet, checkpoints/round=1/optimizer.safetensors missing; restore",
    ):
        replay_round(campaign, 2, model)
    assert replay_round(campaign, 1, model).identical


def test_process_that_had_other_threads_computes_as_one_that_always_had_these(
    config: CampaignConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def embedded(policy: Policy) -> torch.Tensor:
        return policy.encode(TRAIN, config.sample.guidance_scale).embeddings["encoder_hidden_states"]

    monkeypatch.setattr(loaded, "_loaded", {})
    torch.set_num_threads(2)
    try:
        on_two_threads = loaded_policy(config)
        embedded(on_two_threads)
    finally:
        torch.set_num_threads(1)
    assert loaded_policy(config) is not on_two_threads
    assert torch.equal(embedded(loaded_policy(config)), embedded(load_policy(config.model, config.seed)))


def test_checkpoint_says_on_what_it_was_computed(config: CampaignConfig) -> None:
    record = json.loads((config.folder / "checkpoints/round=1/checkpoint.json").read_text())
    assert (record["device"], record["threads"], record["torch"]) == ("cpu", 1, torch.__version__)
    assert record["memory"] == {
        "stays": True, "recomputes": False, "trained": None, "sampled": None, "decoded": 16, "needs": 0,
    }  # fmt: skip


def test_lines_of_the_model_card_load_the_lora(
    config: CampaignConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_lora(config.folder, tmp_path / "lora", "2")
    (lines,) = re.findall(r"```python\n(.*?)```", (tmp_path / "lora" / "README.md").read_text(), re.S)
    monkeypatch.chdir(PROJECT_ROOT)
    names: dict[str, Any] = {}
    exec(lines.replace("FOLDER", str(tmp_path / "lora")), names)
    pipe: StableDiffusionPipeline = names["pipe"]
    stored = load_file(config.folder / "checkpoints/round=2/pytorch_lora_weights.safetensors")
    loaded = {name.replace(".default_0", ""): value for name, value in pipe.unet.state_dict().items() if "lora" in name}
    assert {f"unet.{name}": value.shape for name, value in loaded.items()} == {k: v.shape for k, v in stored.items()}
    assert all(torch.equal(loaded[name.removeprefix("unet.")], value) for name, value in stored.items())
    assert names["image"].size == (64, 64)
