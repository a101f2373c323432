"""Whole rounds with small random models of the other families: the flow, its tables and its checkpoints."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline

from d3po_core.export.lora import export_lora
from d3po_core.seeds import evaluation_seeds, gaussian
from d3po_core.store.campaign import campaign_named
from d3po_core.store.images import load_png
from d3po_core.store.stages import finished_rounds
from d3po_core.store.tables import partition, read_rows
from tests.core.models.tiny_flow_models import side_of, tiny_flow_model
from tests.core.models.tiny_models import tiny_model
from tests.flows.test_kill import SMALL

MODEL = {"device": "cpu", "lora_rank": 2}


def campaign_of(run_rounds: Callable[..., int], data: Path, folder: Path, name: str, **model: Any) -> Path:
    values = {
        **SMALL, "campaign": f"tiny-{name}", "judge": {"scorers": ["brightness"]},
        "model": {**MODEL, "path": str(tiny_model(name, folder / name)), **model},
    }  # fmt: skip
    values["sample"] = {**values["sample"], "guidance_scale": 5.0, "latent_dtype": "float16"}
    assert run_rounds(values, 1) == 0
    return data / "runs" / values["campaign"]


def test_xl_goes_through_a_round_and_its_checkpoint_draws_the_evaluated_images(
    run_rounds: Callable[..., int], data: Path, tmp_path: Path
) -> None:
    """From the checkpoint's file alone, through diffusers' own pipeline call, with our seeds as its noise."""
    campaign = campaign_of(run_rounds, data, tmp_path, "sdxl", memory="balanced")
    base, first = finished_rounds(campaign)
    assert base.round == 0
    assert first.num_pairs > 0
    config = campaign_named("tiny-sdxl")
    row = read_rows(partition(campaign, "evaluations", 1) / "part.parquet")[0]
    (seed, *_) = evaluation_seeds([row["prompt"]], 1, config.seed)
    assert seed.noise_seed == row["seed"]
    pipeline = StableDiffusionXLPipeline.from_pretrained(tmp_path / "sdxl")
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.load_lora_weights(campaign / "checkpoints" / "round=1")
    pipeline.set_progress_bar_config(disable=True)
    steps, shape = config.sample.num_steps, (4, 8, 8)
    noise = iter(gaussian(seed.noise_seed, steps, *shape))
    step = pipeline.scheduler.step

    def with_our_noise(*arguments: Any, **more: Any) -> Any:
        return step(*arguments, **more, eta=1.0, variance_noise=next(noise)[None])

    pipeline.scheduler.step = with_our_noise
    with torch.no_grad():
        (image,) = pipeline(
            row["prompt"], num_inference_steps=steps, guidance_scale=5.0,
            latents=gaussian(seed.initial_seed, *shape)[None], output_type="np",
        ).images  # fmt: skip
    ours = load_png(campaign / row["image_path"]).astype(int)
    assert np.abs(ours - np.round(image * 255).astype(int)).max() <= 2


@pytest.mark.parametrize("settings", [{"name": "sd2"}, {"name": "sd3", "precision": "fp16"}])
def test_other_families_go_through_a_round(
    settings: dict[str, Any], run_rounds: Callable[..., int], data: Path, tmp_path: Path
) -> None:
    campaign = campaign_of(run_rounds, data, tmp_path, **settings)
    assert [record.round for record in finished_rounds(campaign)] == [0, 1]
    updates = read_rows(partition(campaign, "updates", 1) / "part.parquet")
    assert updates
    assert all(np.isfinite(update["loss"]) and update["grad_norm"] > 0 for update in updates)


@pytest.mark.parametrize("name", ["flux-dev", "sd35", "qwen", "z-image", "sana", "klein"])
def test_flow_families_go_through_a_round_and_export(
    name: str, run_rounds: Callable[..., int], data: Path, tmp_path: Path
) -> None:
    """Two-pass, told and no guidance, texts of unequal length, bfloat16: sampled, trained, evaluated, taken away."""
    guidance = 1.0 if name in ("flux-schnell", "klein") else 3.5
    values = {
        **SMALL, "campaign": f"flow-{name}", "judge": {"scorers": ["brightness"]},
        "model": {**MODEL, "path": str(tiny_flow_model(name, tmp_path / name)), "precision": "bf16"},
        "sample": {"groups_per_round": 2, "group_size": 2, "num_steps": 3, "guidance_scale": guidance,
                   "latent_dtype": "float16"},
        "evaluate": {"images_per_prompt": 1, "max_prompts": 2, "grid_prompts": 2},
        "train": {"updates_per_round": 1, "save_every_seconds": 0},
    }  # fmt: skip
    assert run_rounds(values, 1) == 0
    campaign = data / "runs" / values["campaign"]
    assert [record.round for record in finished_rounds(campaign)] == [0, 1]
    updates = read_rows(partition(campaign, "updates", 1) / "part.parquet")
    assert all(np.isfinite(update["loss"]) and update["grad_norm"] > 0 for update in updates)
    export_lora(campaign, tmp_path / "lora", "latest")
    card = (tmp_path / "lora" / "README.md").read_text()
    code = card.partition("```python\n")[2].partition("```")[0].replace("this folder", str(tmp_path / "lora"))
    code = code.replace(f'"{name}"', repr(str(tmp_path / name))).replace('"FOLDER"', repr(str(tmp_path / "lora")))
    side = 2 * side_of(name)
    size = f"height={side}, width={side}, output_type='np', "
    sized = code.replace("num_inference_steps", f"{size}num_inference_steps", 1)
    if name == "sana":
        sized = sized.replace("output_type", "use_resolution_binning=False, output_type", 1)
    scope: dict[str, Any] = {}
    exec(compile(sized, "card", "exec"), scope)  # what a reader of the card types
    assert scope["image"].shape == (side, side, 3)
