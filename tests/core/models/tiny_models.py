"""Small random models of every family, written as the hub's folders; latents of 8 x 8, made in a second."""

import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from d3po_core.paths import resolve_path

TOKENIZER = resolve_path("data/shapes/model/tokenizer")
WIDTH, SECOND_WIDTH = 32, 48  # of the text encoders' states; XL's second is wider
NAMES = ("sd", "sd2", "sd_sample", "sdxl", "sdxl_empty_text", "sd3")

UNET: dict[str, Any] = {
    "sample_size": 8, "layers_per_block": 1, "block_out_channels": (16, 32), "norm_num_groups": 8,
    "attention_head_dim": 2, "cross_attention_dim": WIDTH,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
SDXL: dict[str, Any] = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + SECOND_WIDTH, "cross_attention_dim": WIDTH + SECOND_WIDTH,
    "transformer_layers_per_block": (1, 2), "attention_head_dim": (2, 4),
}  # fmt: skip
PREDICTIONS = {"sd2": "v_prediction", "sd_sample": "sample"}


def tiny_model(name: str, folder: Path) -> Path:
    """Write the model of a name into a folder, the same weights every time; returns the folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sum(name.encode()))
        pipeline = _sd3() if name == "sd3" else _sdxl(name) if name.startswith("sdxl") else _sd(name)
    shutil.rmtree(folder, ignore_errors=True)
    pipeline.save_pretrained(folder)
    return folder


def tokenizer() -> CLIPTokenizer:
    """The embedded model's, which knows its world's words."""
    return CLIPTokenizer.from_pretrained(TOKENIZER)


def text_config(width: int = WIDTH) -> CLIPTextConfig:
    """A text encoder's configuration, for the embedded model's tokenizer."""
    marks = tokenizer()
    return CLIPTextConfig(
        hidden_size=width, intermediate_size=width, num_hidden_layers=2, num_attention_heads=2, projection_dim=width,
        vocab_size=len(marks), max_position_embeddings=marks.model_max_length, bos_token_id=marks.bos_token_id,
        eos_token_id=marks.eos_token_id, pad_token_id=marks.pad_token_id,
    )  # fmt: skip


def small_vae(latent_channels: int = 4, **more: Any) -> AutoencoderKL:
    """A VAE with two pixels per latent element."""
    return AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=latent_channels, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **more,
    )  # fmt: skip


def _scheduler(name: str) -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type=PREDICTIONS.get(name, "epsilon"),
    )  # fmt: skip


def _sd(name: str) -> StableDiffusionPipeline:
    linear = {"use_linear_projection": True} if name == "sd2" else {}
    return StableDiffusionPipeline(
        unet=UNet2DConditionModel(**UNET | linear), vae=small_vae(), text_encoder=CLIPTextModel(text_config()),
        tokenizer=tokenizer(), scheduler=_scheduler(name), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def _sdxl(name: str) -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline(
        unet=UNet2DConditionModel(**UNET | SDXL), vae=small_vae(), text_encoder=CLIPTextModel(text_config()),
        text_encoder_2=CLIPTextModelWithProjection(text_config(SECOND_WIDTH)), tokenizer=tokenizer(),
        tokenizer_2=tokenizer(), scheduler=_scheduler(name), force_zeros_for_empty_prompt=name == "sdxl",
    )  # fmt: skip


def _sd3() -> StableDiffusion3Pipeline:
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=8, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=2 * WIDTH, caption_projection_dim=32, pooled_projection_dim=2 * WIDTH, out_channels=8,
    )  # fmt: skip
    encoders = {f"text_encoder{n}": CLIPTextModelWithProjection(text_config()) for n in ("", "_2")}
    return StableDiffusion3Pipeline(
        transformer=transformer, vae=small_vae(8, shift_factor=0.06, scaling_factor=1.5), **encoders,
        tokenizer=tokenizer(), tokenizer_2=tokenizer(), text_encoder_3=None, tokenizer_3=None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip


def pipeline_of(folder: Path) -> Any:
    """Diffusers' own pipeline of a small model."""
    absent = {"text_encoder_3": None, "tokenizer_3": None} if folder.name == "sd3" else {}
    pipeline = DiffusionPipeline.from_pretrained(folder, **absent)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
