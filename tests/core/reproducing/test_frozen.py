"""What a campaign's numbers depend on may not change without a word."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from d3po_core.config import CampaignConfig
from d3po_core.config_values import load_config
from d3po_core.errors import D3POError
from d3po_core.paths import resolve_path
from d3po_core.reproducing.frozen import FROZEN_FILE, freeze

PROMPTS = ["a red circle", "a blue cross", "a green square"]


@pytest.fixture
def config(tmp_path: Path) -> CampaignConfig:
    model = tmp_path / "model"
    shutil.copytree(resolve_path("data/shapes/model"), model)
    (tmp_path / "taste.py").write_text("def taste(images, prompts):\n    return images.mean(axis=(1, 2, 3))\n")
    return config_of(tmp_path)


def config_of(tmp_path: Path, **changes: Any) -> CampaignConfig:
    values = {
        "campaign": "c", "runs_dir": str(tmp_path / "runs"), "model": {"path": str(tmp_path / "model")},
        "judge": {"scorers": ["taste:taste"]}, **changes,
    }  # fmt: skip
    return load_config(values, "test")


def test_what_stays_as_it_was_is_no_change(config: CampaignConfig) -> None:
    assert freeze(config, PROMPTS) == []
    before = (config.folder / FROZEN_FILE).read_bytes()
    assert freeze(config, PROMPTS) == []
    assert (config.folder / FROZEN_FILE).read_bytes() == before


def test_held_out_prompts_are_part_of_the_campaign(config: CampaignConfig) -> None:
    freeze(config, PROMPTS)
    with pytest.raises(D3POError, match=r"1 are gone \('a blue cross'\), 1 are new \('a new one'\)") as caught:
        freeze(config, ["a red circle", "a green square", "a new one"])
    assert "\n" not in str(caught.value)
    allowed = config.model_copy(update={"accept_changes": True})
    with pytest.raises(D3POError, match="held-out prompts changed"):
        freeze(allowed, PROMPTS[:2])


def test_a_campaign_of_an_earlier_version_stays_with_what_its_base_was_evaluated_on(config: CampaignConfig) -> None:
    with pytest.raises(D3POError, match="1 are new"):
        freeze(config, PROMPTS, evaluated=[PROMPTS[0], PROMPTS[0], PROMPTS[1]])


def test_a_model_that_was_overwritten_is_an_error_or_recorded(config: CampaignConfig, tmp_path: Path) -> None:
    freeze(config, PROMPTS)
    weights = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(D3POError, match=r"unet/diffusion_pytorch_model.safetensors of the model was changed since"):
        freeze(config, PROMPTS)
    accepting = config.model_copy(update={"accept_changes": True})
    (change,) = freeze(accepting, PROMPTS)
    assert "was changed" in change
    (accepted,) = json.loads((config.folder / FROZEN_FILE).read_text())["accepted"]
    assert accepted["changes"] == [change]
    assert freeze(config, PROMPTS) == []


def test_a_scorer_of_ones_own_that_was_edited_is_noticed(
    config: CampaignConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    freeze(config, PROMPTS)
    (tmp_path / "taste.py").write_text("def taste(images, prompts):\n    return -images.mean(axis=(1, 2, 3))\n")
    with pytest.raises(D3POError, match=r"taste.py of the scorer taste:taste was changed"):
        freeze(config, PROMPTS)


def test_a_touched_file_with_the_same_content_is_no_change(config: CampaignConfig, tmp_path: Path) -> None:
    freeze(config, PROMPTS)
    for path in (tmp_path / "model").rglob("*.json"):
        path.touch()
    assert freeze(config, PROMPTS) == []


def test_damaged_notes_are_one_line(config: CampaignConfig) -> None:
    freeze(config, PROMPTS)
    (config.folder / FROZEN_FILE).write_text("[]")
    with pytest.raises(D3POError, match=r"frozen\.json: cannot be read"):
        freeze(config, PROMPTS)


def test_a_digit_of_the_notes_that_changed_is_noticed(config: CampaignConfig) -> None:
    freeze(config, PROMPTS)
    path = config.folder / FROZEN_FILE
    content = json.loads(path.read_text())
    content["held_out"][0] += "s"
    path.write_text(json.dumps(content))
    with pytest.raises(D3POError, match=r"frozen\.json: has other content than was written"):
        freeze(config, [content["held_out"][0], *PROMPTS[1:]])


def test_a_hub_model_whose_snapshot_changed_is_an_error_or_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "snapshots" / "0"
    shutil.copytree(resolve_path("data/shapes/model"), snapshot)

    def cached(name: str, file: str, revision: str | None) -> str | None:
        return str(snapshot / file) if name == "some/model" else None

    monkeypatch.setattr("d3po_core.models.places.try_to_load_from_cache", cached)
    config = config_of(tmp_path, model={"path": "some/model"}, judge={"scorers": ["brightness"]})
    freeze(config, PROMPTS)
    snapshot = Path(shutil.copytree(snapshot, tmp_path / "snapshots" / "1"))
    weights = snapshot / "unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(D3POError, match=r"unet/diffusion_pytorch_model.safetensors of the model was changed since"):
        freeze(config, PROMPTS)
    (change,) = freeze(config.model_copy(update={"accept_changes": True}), PROMPTS)
    assert "was changed" in change
