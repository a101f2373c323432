"""The disk that a round needs: what is counted, and that it is said before any work."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from d3po_core.config import CampaignConfig
from d3po_core.config_values import load_config
from d3po_core.errors import D3POError
from d3po_core.models.space import check_space, round_bytes
from tests.core.models.tiny_models import tiny_model


def config_in(folder: Path, **changes: Any) -> CampaignConfig:
    return load_config({"campaign": "c", "runs_dir": str(folder), **changes}, "test")


def disk_with(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    usage = shutil.disk_usage("/")._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)


def test_too_small_a_disk_is_said_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_in(tmp_path / "not yet made")
    needed = round_bytes(config)
    disk_with(monkeypatch, needed - 1)
    with pytest.raises(D3POError, match=r"a round needs about .* MB.*groups_per_round") as caught:
        check_space(config)
    assert "\n" not in str(caught.value)
    assert str(config.folder) in str(caught.value)
    disk_with(monkeypatch, needed)
    check_space(config)


def test_space_is_that_of_the_disk_that_the_campaign_will_lie_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(Path(path)) or usage)
    check_space(config_in(tmp_path / "deep" / "below"))
    assert asked == [tmp_path]


def test_round_bytes_cover_trajectories_and_images(tmp_path: Path) -> None:
    small = config_in(tmp_path, sample={"groups_per_round": 1, "group_size": 2})
    large = config_in(tmp_path, sample={"groups_per_round": 11, "group_size": 2})
    steps, elements = small.sample.num_steps, 4 * 8 * 8
    per_image = (steps + 1) * elements * 4 + 3 * 64 * 64
    assert round_bytes(large) - round_bytes(small) == 20 * per_image
    half = config_in(tmp_path, sample={"groups_per_round": 1, "group_size": 2, "latent_dtype": "float16"})
    assert round_bytes(small) - round_bytes(half) == 2 * (steps + 1) * elements * 2


def test_a_flow_models_latents_count_as_large_as_they_are_stored(tmp_path: Path) -> None:
    """The files that the round then writes are measured in tests/flows/test_families_in_flow.py."""
    model = {"path": str(tiny_model("sd3", tmp_path / "sd3"))}
    sizes = [
        round_bytes(config_in(tmp_path, model=model, sample={"groups_per_round": groups, "group_size": 2}))
        for groups in (1, 11)
    ]
    steps, channels, side, pixels = 10, 8, 8, 16  # the small model's: 8 channels, a VAE that doubles each side
    assert sizes[1] - sizes[0] == 20 * ((steps + 1) * channels * side * side * 4 + 3 * pixels * pixels)
