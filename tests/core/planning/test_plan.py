"""Plans: counts, times and downloads, against other code's answers and numbers worked out by hand."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import HfApi
from hypothesis import given
from hypothesis import strategies as st

from d3po.flows.presets import deployment_config, presets
from d3po_core.config import CampaignConfig, TrainConfig
from d3po_core.config_values import load_config
from d3po_core.errors import D3POError
from d3po_core.machine.gpus import Driver, Gpu, TorchBuild
from d3po_core.models.space import latent_and_pixels, round_bytes
from d3po_core.paths import PROJECT_ROOT
from d3po_core.planning import plan as planning
from d3po_core.planning import preflight
from d3po_core.planning.downloads import Download, download_bytes, missing_downloads
from d3po_core.planning.model_facts import disk_bytes, facts_of
from d3po_core.planning.plan import make_plan
from d3po_core.planning.preflight import check_hub, problems
from d3po_core.planning.rates import RATES_FILE, measured_rate
from d3po_core.planning.timing import estimate
from d3po_core.planning.told import duration, sections, size, three_lines
from d3po_core.planning.work import count_updates, round_work
from d3po_core.training.trainer import plan_updates
from tests.core.little_campaign import LittleCampaign
from tests.core.models.tiny_flow_models import FLOW_NAMES, tiny_flow_model
from tests.core.models.tiny_models import tiny_model

H200 = Driver((13, 0), (Gpu("NVIDIA H200", 141_000_000_000),))


def config_of(**values: Any) -> CampaignConfig:
    return load_config({"campaign": "c", **values}, "test")


@pytest.fixture
def with_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (planning, preflight):
        monkeypatch.setattr(module, "find_driver", lambda: H200)
        monkeypatch.setattr(module, "torch_build", lambda: TorchBuild("2.13.0", "13.0", None))


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (planning, preflight):
        monkeypatch.setattr(module, "find_driver", lambda: None)


@given(
    groups=st.integers(1, 40), epochs=st.integers(1, 4), each=st.integers(1, 12), per_group=st.booleans(),
    seed=st.integers(0, 9),
)  # fmt: skip
def test_updates_are_as_many_as_training_plans(groups: int, epochs: int, each: int, per_group: bool, seed: int) -> None:
    updates = "one_per_group" if per_group else each * epochs
    train = TrainConfig(updates_per_round=updates, epochs=epochs)
    assert count_updates(groups, train) == len(plan_updates(groups, train, seed))


@pytest.mark.parametrize("name", ["sd", "sdxl", "sd3", *FLOW_NAMES])
def test_a_models_size_is_read_as_the_families_read_it(name: str, tmp_path: Path) -> None:
    made = tiny_flow_model if name in FLOW_NAMES else tiny_model
    config = config_of(model={"path": str(made(name, tmp_path / name))}, runs_dir=str(tmp_path))
    facts = facts_of(config.model)
    assert (facts.latent, facts.per_side) == latent_and_pixels(config.model)
    assert disk_bytes(config, facts) == round_bytes(config)


def test_every_measured_rate_is_in_the_page_that_it_names() -> None:
    page = (PROJECT_ROOT / "docs/gpu.md").read_text().replace("*", "")
    for rate in json.loads(RATES_FILE.read_text())["rates"]:
        section = re.split(r"^## ", page, flags=re.M)
        (text,) = [part for part in section if part.startswith(rate["section"] + "\n")]
        if rate["pixels"] == 64:  # computed: 128 images of 10 steps in 2.8 and 3.3 s
            assert "sampling 2.8, training 3.3" in text
            assert rate["images_per_second"] == pytest.approx(128 / 2.8, rel=0.01)
            assert rate["image_steps_per_second"] == pytest.approx(1280 / 3.3, rel=0.01)
            continue
        if "card_gb" in rate:
            (text,) = [line for line in text.splitlines() if f"{rate['pixels']:,} px | {rate['card_gb']} |" in line
                       and ("SD3" in line) == ("3" in rate["family"])]  # fmt: skip
        assert f"{rate['images_per_second']} " in text or f"{rate['images_per_second']:.2f} " in text
        assert (
            f"{rate['image_steps_per_second'] / 2:.1f} " in text or f"{rate['image_steps_per_second'] / 2:g} " in text
        )  # pair-steps, in pairs of two images
        assert f"{rate['peak_gb']:g} " in text


def test_presets_times_are_near_the_measured_whole_round() -> None:
    """docs/gpu.md: 256 images of `sd15` took 24.7 s to sample, 51.3 s per pass over them, 20.4 s to evaluate."""
    config = deployment_config("sd15", None, ["model.memory=fast"])
    facts = facts_of(config.model)
    timing = estimate(config, round_work(config, 200), facts)
    assert timing.stages["sample"] == pytest.approx(24.7, rel=0.25)
    assert timing.stages["train"] / 2 == pytest.approx(51.3, rel=0.25)
    assert timing.stages["evaluate"] == pytest.approx(20.4, rel=0.4)
    assert "docs/gpu.md" in timing.source


def test_a_mode_that_was_not_measured_has_no_time() -> None:
    for change in ("model.memory=small", "model.train=full", "compute.processes=2", "model.device=cpu"):
        config = deployment_config("sd15", None, [f"--set {change}".split()[1]])
        assert measured_rate(config, facts_of(config.model)) is None
        timing = estimate(config, round_work(config, 200), facts_of(config.model))
        assert timing.seconds is None
        assert "no measurement" in timing.source


@pytest.mark.parametrize(
    ("gb", "expected"), [(11.6, None), (12.9, 7.1), (25.7, 6.7), (85.0, 6.7)]
)  # fmt: skip
def test_auto_is_as_fast_as_on_the_nearest_smaller_card(gb: float, expected: float | None) -> None:
    config = deployment_config("sd15", None, [])
    rate = measured_rate(config, facts_of(config.model), int(gb * 1e9))
    assert (rate and rate.images_per_second) == expected
    assert measured_rate(config, facts_of(config.model), None) is None  # no GPU


def test_a_campaigns_own_rounds_come_first_and_scale_with_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("D3PO_DATA", str(tmp_path))
    settings = {"sample": {"groups_per_round": 4}, "train": {"epochs": 2, "updates_per_round": "one_per_group"}}
    started = config_of(**settings)
    little = LittleCampaign(tmp_path / "runs" / "c", ["up"], config=started.model_dump(mode="json"))
    for number, seconds in enumerate([9.0, 2.0, 4.0, 3.0]):
        times = {f"{stage}_seconds": seconds for stage in ("sample", "judge", "derive", "train", "evaluate", "publish")}
        little.add_round(number, np.zeros((1, 2)), images=False, **times)
    twice = config_of(sample={"groups_per_round": 8}, train={"epochs": 2, "updates_per_round": "one_per_group"})
    same, more = (estimate(c, round_work(c, 1), facts_of(c.model)) for c in (started, twice))
    assert same.stages == {"sample": 3, "judge": 3, "derive": 3, "train": 3, "evaluate": 3.5, "publish": 3.5}
    assert more.stages == {"sample": 6, "judge": 6, "derive": 6, "train": 6, "evaluate": 3.5, "publish": 3.5}
    assert "own rounds (0, 1, 2, 3)" in same.source
    assert make_plan(started, 2).rounds == [4, 5]
    other = config_of(**settings, model={"memory": "small"})  # rounds of another mode tell nothing
    assert estimate(other, round_work(other, 1), facts_of(other.model)).seconds is None


def test_a_gpu_preset_stops_without_a_gpu_and_not_if_the_cpu_is_asked_for(without_gpu: None) -> None:
    for name in presets():
        found = [str(problem) for problem in problems(deployment_config(name, None, []))]
        assert any("meant for a GPU" in problem for problem in found) == (name not in ("round", "published", "human"))
    on_cpu = deployment_config("sd15", None, ["model.device=cpu"])
    assert list(problems(on_cpu)) == []
    (asked,) = problems(config_of(model={"device": "cuda"}))
    assert str(asked).startswith("model.device is 'cuda', and there is no GPU to use")


def test_a_large_network_asks_for_a_gpu_by_itself(
    without_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(model={"path": str(tiny_model("sd", tmp_path / "sd"))})
    assert list(problems(config)) == []
    monkeypatch.setattr(preflight, "LARGE_NETWORK", 1000)
    assert "a network of 0.0 GB" in str(next(problems(config)))


def test_a_gpu_preset_passes_with_a_gpu(with_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "missing_downloads", lambda config: [])
    plan = make_plan(deployment_config("sd15", None, ["model.memory=fast"]), 2)
    assert plan.problems == []
    lines = three_lines(plan)
    assert lines[0] == (
        "what      campaign sd15, the base (only evaluated), then rounds 1 to 2: 256 images, up to 384 pairs, up to "
        "128 updates, 128 held-out images per round"
    )
    assert "NVIDIA H200, 141 GB" in lines[2]
    assert dict(sections(plan))["GPU memory"] == "peak 98.6 GB when measured"
    small = replace(plan, gpu=Gpu("NVIDIA RTX 4090", 25_000_000_000))
    assert "this GPU has 25 GB" in dict(sections(small))["GPU memory"]
    learned = dict(sections(replace(plan, scorers=["pickscore"])))["time"]
    assert "without start-up and judging by pickscore: " in learned
    assert "judging by" not in dict(sections(replace(plan, scorers=["jpeg_incompressibility"])))["time"]


def test_a_scorer_and_a_file_that_are_missing_are_both_told() -> None:
    config = config_of(judge={"scorers": ["beauty"]}, sample={"prompts": "missing.txt"})
    found = [str(problem) for problem in problems(config)]
    assert [text.partition(":")[0].partition(" is")[0] for text in found] == [
        "sample.prompts 'missing.txt'", "scorer 'beauty'",
    ]  # fmt: skip


FILES = {
    "model_index.json": 5, "unet/config.json": 10, "unet/diffusion_pytorch_model.safetensors": 4000,
    "unet/diffusion_pytorch_model.fp16.safetensors": 2000, "unet/diffusion_pytorch_model.bin": 4000,
    "vae/diffusion_pytorch_model.safetensors": 300, "text_encoder/model.safetensors": 600, "whole.safetensors": 9000,
    "safety_checker/model.safetensors": 1000, "tokenizer/vocab.json": 20,
}  # fmt: skip


@pytest.mark.parametrize(("variant", "expected"), [(None, 10 + 4000 + 300 + 600 + 20), ("fp16", 2000 + 10 + 920)])
def test_only_the_parts_and_the_variant_that_loading_wants_count(variant: str | None, expected: int) -> None:
    assert download_bytes(Download("model.path", "a/b", variant=variant), FILES) == expected


def test_a_hub_that_is_away_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: Any, **__: Any) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr(HfApi, "model_info", away)
    config = config_of(model={"path": "nobody/nothing"}, judge={"scorers": ["pickscore"]})
    assert [download.field for download in missing_downloads(config)] == ["model.path", "scoring.models.pickscore"]
    with pytest.raises(D3POError, match=r"model.path 'nobody/nothing' is neither a folder.*reached") as caught:
        check_hub(config)
    assert "\n" not in str(caught.value)
    plan = make_plan(config, 1)
    assert plan.downloads == {"nobody/nothing": None, "yuvalkirstain/PickScore_v1": None}
    assert len(plan.problems) == 2


def test_a_download_that_was_cut_off_or_lacks_the_variant_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = Path(shutil.copytree(PROJECT_ROOT / "data/shapes/model", tmp_path / "model"))
    monkeypatch.setattr("d3po_core.planning.downloads.cached_folder", lambda name, revision: snapshot)
    whole, variant = config_of(model={"path": "a/b"}), config_of(model={"path": "a/b", "variant": "fp16"})
    assert missing_downloads(whole) == []
    assert [download.variant for download in missing_downloads(variant)] == ["fp16"]
    weights = snapshot / "vae/diffusion_pytorch_model.safetensors"
    weights.unlink()
    weights.symlink_to(tmp_path / "blob that never came")
    assert [download.hub_id for download in missing_downloads(whole)] == ["a/b"]


@pytest.mark.parametrize(("seconds", "text"), [(0.2, "under 1 s"), (89, "89 s"), (120, "2 min"), (7200, "2.0 h")])
def test_durations_are_rounded(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(900, "0.9 kB"), (2.14e6, "2.1 MB"), (35e9, "35 GB")])
def test_sizes_are_rounded(count: float, text: str) -> None:
    assert size(count) == text


def test_a_wrong_folder_is_no_hub_id_and_is_told_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("D3PO_DATA", str(tmp_path))
    (told,) = make_plan(config_of(model={"path": "/nope"}), 1).problems
    assert told.startswith("model.path '/nope': no such folder")
    (told,) = make_plan(config_of(model={"path": str(tmp_path)}), 1).problems
    assert "model_index.json is missing" in told
