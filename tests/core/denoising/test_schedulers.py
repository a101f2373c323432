"""What a folder's scheduler means for the trained chain, against diffusers' own classes and images."""

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from d3po_core.config import CampaignConfig, ModelConfig, SampleConfig
from d3po_core.config_values import load_config
from d3po_core.denoising.flow import make_flow_schedule, variance_left
from d3po_core.denoising.schedulers import chain_of
from d3po_core.errors import D3POError
from d3po_core.models.loaded import load_policy
from d3po_core.models.loading import check_model
from d3po_core.models.model_files import with_model_defaults
from d3po_core.models.prompt_length import check_length
from d3po_core.paths import resolve_path
from d3po_core.sampling.prompts import load_prompts
from d3po_core.sampling.rollout import draw_images
from d3po_core.scorers.finding import BUILT_IN
from d3po_core.seeds import evaluation_seeds
from tests.core.models.single_files import write_single_file
from tests.core.models.tiny_models import tiny_model

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
CONVERTED = (
    "DDIMScheduler", "PNDMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler", "LMSDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "DEISMultistepScheduler", "UniPCMultistepScheduler",
)  # fmt: skip
MODEL = resolve_path("data/shapes/model")
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}


def config_of(name: str, **options: Any) -> dict[str, Any]:
    scheduler = getattr(diffusers, name)(**{**SCHEDULE, **options})
    return {**scheduler.config, "_class_name": name}


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", CONVERTED)
def test_noise_schedule_and_prediction_are_the_source_schedulers(name: str, prediction_type: str) -> None:
    source = getattr(diffusers, name)(**SCHEDULE, prediction_type=prediction_type)
    chain = chain_of(config_of(name, prediction_type=prediction_type))
    torch.testing.assert_close(chain.alphas_cumprod, source.alphas_cumprod, rtol=1e-6, atol=0)
    assert chain.config.prediction_type == prediction_type
    assert chain.config.clip_sample == source.config.get("clip_sample", False)
    assert chain.config.timestep_spacing == source.config.get("timestep_spacing", "leading")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("LCMScheduler", {}, "a distilled model"), ("TCDScheduler", {}, "a distilled model"),
        ("EDMDPMSolverMultistepScheduler", None, "its steps cannot be trained"),
        ("FlowMatchEulerDiscreteScheduler", None, "its steps cannot be trained"),
        ("DDIMInverseScheduler", None, "its steps cannot be trained"), ("NoSuchScheduler", None, "cannot be trained"),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True}, "use_karras_sigmas is True"),
        ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}, r"distilled \(Turbo, Lightning\)"),
        ("EulerDiscreteScheduler", {"timestep_type": "continuous"}, "timestep_type is 'continuous'"),
        ("DPMSolverMultistepScheduler", {"prediction_type": "flow_prediction", "use_flow_sigmas": True},
         "prediction_type is 'flow_prediction'"),
        ("UniPCMultistepScheduler", {"use_exponential_sigmas": True}, "use_exponential_sigmas"),
        ("DDPMScheduler", {"variance_type": "learned_range"}, "variance_type is 'learned_range'"),
        ("DDIMScheduler", {"thresholding": True}, "thresholding is True"),
        ("DDIMScheduler", {"rescale_betas_zero_snr": True}, "divides by nothing"),
        ("DDIMScheduler", {"prediction_type": ["epsilon"]}, r"prediction_type is \['epsilon'\]"),
        ("DDIMScheduler", {"steps_offset": []}, r"steps_offset is \[\]; expected int"),
    ],
)  # fmt: skip
def test_what_the_chain_cannot_follow_is_refused(name: str, options: dict[str, Any] | None, message: str) -> None:
    config = {"_class_name": name} if options is None else {**config_of(name), **options}
    with pytest.raises(D3POError, match=message) as caught:
        chain_of(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("betas", [[0.01], [0.01] * 999, "0.01", 0.01])
def test_betas_that_are_not_one_for_each_timestep_are_refused(betas: Any) -> None:
    config = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "trained_betas": betas}
    with pytest.raises(D3POError, match=r"trained_betas holds .*; expected one for each of 1000 timesteps"):
        chain_of(config)


@pytest.mark.parametrize("name", ["PNDMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_a_folder_with_another_scheduler_draws_as_well_as_the_shipped_one(name: str, tmp_path: Path) -> None:
    """With DDIM's own defaults filled in (clipping) the base drew 0.08 of the images right in place of 0.52."""
    folder = Path(shutil.copytree(MODEL, tmp_path / "model"))
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config_of(name, steps_offset=1)))
    policy = load_policy(ModelConfig(path=str(folder), device="cpu"), seed=0)
    prompts = load_prompts("data/prompts/shapes_eval.txt", "prompt", "evaluate.prompts")[:18]
    seeds = evaluation_seeds(prompts, 4, 0)
    _, images = draw_images(policy, SampleConfig(num_steps=20, batch_size=72), seeds, torch.float32)
    assert (
        np.mean(BUILT_IN["prompt_alignment"](images, [seed.prompt for seed in seeds])) > 0.4
    )  # 72 images, standard error 0.06


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merged file of SDXL, a folder that describes it, and one that describes a v-prediction model."""
    root = tmp_path_factory.mktemp("single")
    write_single_file(tiny_model("sdxl", root / "sdxl"), root / "plain.safetensors")
    for folder, prediction in (("epsilon", "epsilon"), ("v", "v_prediction")):
        shutil.copytree(root / "sdxl", root / folder, ignore=shutil.ignore_patterns("*.safetensors"))
        path = root / folder / "scheduler" / "scheduler_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "prediction_type": prediction}))
    return root


def marked(single: Path, tmp_path: Path, *tensors: str, **metadata: str) -> Path:
    state = load_file(single / "plain.safetensors") | {name: torch.zeros(0) for name in tensors}
    save_file(state, tmp_path / "marked.safetensors", metadata={k.replace("__", "."): v for k, v in metadata.items()})
    return tmp_path / "marked.safetensors"


def prediction_of(path: Path, described_by: Path, **fields: Any) -> tuple[str, bool]:
    values = {"path": str(path), "single_file_config": str(described_by), "device": "cpu", "lora_rank": 2, **fields}
    config = load_policy(ModelConfig.model_validate(values), seed=0).family.pipeline.scheduler.config
    return config.prediction_type, config.rescale_betas_zero_snr


def test_a_merged_file_of_v_prediction_is_not_taken_for_epsilon(single: Path, tmp_path: Path) -> None:
    file = marked(single, tmp_path, "v_pred")
    with pytest.raises(D3POError, match="marks itself as prediction_type 'v_prediction', but single_file_config says"):
        prediction_of(file, single / "epsilon")
    assert prediction_of(file, single / "v") == ("v_prediction", False)
    assert prediction_of(file, single / "epsilon", prediction_type="v_prediction") == ("v_prediction", False)
    with pytest.raises(D3POError, match=r"but model.prediction_type is 'epsilon'"):
        prediction_of(file, single / "epsilon", prediction_type="epsilon")


def test_zero_terminal_snr_and_metadata_are_marks_too(single: Path, tmp_path: Path) -> None:
    file = marked(single, tmp_path, "v_pred", "ztsnr")
    with pytest.raises(D3POError, match="marks itself as zero_terminal_snr True"):
        prediction_of(file, single / "v")
    assert prediction_of(file, single / "v", zero_terminal_snr=True) == ("v_prediction", True)
    told = marked(single, tmp_path, **{"modelspec__prediction_type": "v"})
    with pytest.raises(D3POError, match="marks itself as prediction_type 'v_prediction'"):
        prediction_of(told, single / "epsilon")
    assert prediction_of(single / "plain.safetensors", single / "epsilon") == ("epsilon", False)


def scheduler_of_sd3(tmp_path: Path, config: dict[str, Any]) -> Path:
    folder = tiny_model("sd3", tmp_path / "sd3")
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("UniPCMultistepScheduler", FLOW, "other noise levels"), ("DPMSolverMultistepScheduler", FLOW, "noise levels"),
        ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}, "invert_sigmas is True"),
        ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, "stochastic_sampling is True"),
    ],
)  # fmt: skip
def test_a_flow_with_another_solver_is_refused(
    name: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    full = {**getattr(diffusers, name)(**options).config, "_class_name": name}
    folder = scheduler_of_sd3(tmp_path, full)
    with pytest.raises(D3POError, match=message) as caught:
        check_model(ModelConfig(path=str(folder), device="cpu"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("noise_level", "left"), [(1.0, 15.0), (0.7, 5.54)])
def test_too_much_noise_leaves_grain(noise_level: float, left: float) -> None:
    """By simulation: Gaussian data of a variance of 0.01 through 10 steps at a shift of 3, with the exact velocity."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    schedule = make_flow_schedule(scheduler, 10, noise_level)
    assert variance_left(schedule) == pytest.approx(left, rel=0.01)
    scheduler.set_timesteps(10)
    noise = torch.randn(11, 200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x, sigmas = noise[10], scheduler.sigmas.double()
    for step, (t, following) in enumerate(itertools.pairwise(sigmas.tolist())):
        dt, bounded = following - t, t if t < 1 else float(sigmas[1])
        x0 = (1 - t) * 0.01 / ((1 - t) ** 2 * 0.01 + t**2) * x
        velocity = (x - x0) / t
        s2 = noise_level**2 * t / (1 - bounded)
        x = x + (velocity + s2 / (2 * t) * (x + (1 - t) * velocity)) * dt + (s2 * -dt) ** 0.5 * noise[step]
    assert float(x.var()) / 0.01 == pytest.approx(left, rel=0.02)


@pytest.mark.parametrize(("num_steps", "eta"), [(10, 0.35), (20, 0.7), (28, 0.7)])
def test_a_flow_has_its_own_default_noise_level(num_steps: int, eta: float, tmp_path: Path) -> None:
    values = {"model": {"path": str(tiny_model("sd3", tmp_path / "sd3"))}, "sample": {"num_steps": num_steps}}
    assert with_model_defaults(load_config(values, "test")).sample.eta == eta
    own = load_config({**values, "sample": {"num_steps": num_steps, "eta": 1.0}}, "test")
    assert with_model_defaults(own).sample.eta == 1.0
    assert with_model_defaults(CampaignConfig()) == CampaignConfig()


def test_prompts_beyond_the_window_are_counted_and_named(tmp_path: Path) -> None:
    config = ModelConfig(path=str(tiny_model("sd3", tmp_path / "sd3")))
    short, long = "a red circle", "a red circle on a gray background " * 5
    assert check_length(config, [short]) == []
    warnings = check_length(config, [short, long])
    assert len(warnings) == 2  # two encoders
    assert warnings[0].startswith("1 prompt is longer than the ")
    assert "tokens that tokenizer reads" in warnings[0]
    assert repr(long[:60]) in warnings[0]


def test_prompts_that_differ_only_beyond_the_window_are_refused(tmp_path: Path) -> None:
    config = ModelConfig(path=str(tiny_model("sd", tmp_path / "sd")))
    long = "a red circle on a gray background " * 5
    with pytest.raises(D3POError, match="are the same to the model's text encoders"):
        check_length(config, [long + "blue", long + "green"])
