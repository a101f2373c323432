"""Small random models of the flow-matching families, written as the hub's folders; latents of 8 x 8."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from tests.core.models.tiny_models import WIDTH, tokenizer

SIDE = 8
# As FLUX.1-dev's, Qwen-Image's and others' files have them.
DYNAMIC: dict[str, Any] = {
    "use_dynamic_shifting": True, "shift": 3.0, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}  # fmt: skip


def tiny_flow_model(name: str, folder: Path) -> Path:
    """Write the model of a name into a folder, the same weights every time; returns the folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(sum(name.encode()))
        pipeline = MADE[name]()
        for parameter in pipeline.transformer.parameters():  # some start at zero, which would hide what they do
            if not parameter.any():
                parameter.data.normal_(std=0.1)
    shutil.rmtree(folder, ignore_errors=True)
    pipeline.save_pretrained(folder)
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "sample_size": SIDE}))
    return folder


def clip(width: int = WIDTH) -> CLIPTextConfig:
    """A text encoder's configuration, for the embedded model's tokenizer."""
    marks = tokenizer()
    return CLIPTextConfig(
        hidden_size=width, intermediate_size=width, num_hidden_layers=2, num_attention_heads=2, projection_dim=width,
        vocab_size=len(marks), max_position_embeddings=marks.model_max_length, bos_token_id=marks.bos_token_id,
        eos_token_id=marks.eos_token_id, pad_token_id=marks.pad_token_id,
    )  # fmt: skip


def vae(latent_channels: int, **more: Any) -> AutoencoderKL:
    """A VAE with two pixels per latent element, shifted and scaled."""
    return AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=latent_channels, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, shift_factor=0.1,
        scaling_factor=0.4, use_quant_conv=False, use_post_quant_conv=False, **more,
    )  # fmt: skip


def _flux(guidance: bool) -> FluxPipeline:
    marks = tokenizer()
    t5 = T5Config(vocab_size=len(marks), d_model=WIDTH, d_kv=8, d_ff=WIDTH, num_layers=1, num_heads=2)
    return FluxPipeline(
        transformer=FluxTransformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, guidance_embeds=guidance, axes_dims_rope=(4, 6, 6),
        ),
        vae=vae(4), text_encoder=CLIPTextModel(clip()), text_encoder_2=T5EncoderModel(t5), tokenizer=marks,
        tokenizer_2=tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(**(DYNAMIC if guidance else {"shift": 1.0})),
    )  # fmt: skip


def _sd35() -> StableDiffusion3Pipeline:
    """What 3.5 has and 3 lacks: a second attention in some blocks, normed queries and keys; and all three encoders."""
    marks = tokenizer()
    t5 = T5Config(vocab_size=len(marks), d_model=2 * WIDTH, d_kv=8, d_ff=WIDTH, num_layers=1, num_heads=2)
    encoders = {f"text_encoder{n}": CLIPTextModelWithProjection(clip()) for n in ("", "_2")}
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=SIDE, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
            joint_attention_dim=2 * WIDTH, caption_projection_dim=32, pooled_projection_dim=2 * WIDTH,
            dual_attention_layers=(0,), qk_norm="rms_norm",
        ),
        vae=vae(4), **encoders, text_encoder_3=T5EncoderModel(t5), tokenizer=marks, tokenizer_2=tokenizer(),
        tokenizer_3=tokenizer(), scheduler=FlowMatchEulerDiscreteScheduler(**DYNAMIC),
    )  # fmt: skip


MADE: dict[str, Callable[[], Any]] = {
    "flux-dev": lambda: _flux(True),
    "flux-schnell": lambda: _flux(False),
    "sd35": _sd35,
}
FLOW_NAMES = tuple(MADE)
