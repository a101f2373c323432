"""Models of the published sizes with random weights: what a pass costs does not depend on what was learned."""

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from d3po_core.paths import resolve_path

TOKENIZER = "data/shapes/model/tokenizer"
PROMPT_TOKENS = 77
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512), "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4, "layers_per_block": 2, "latent_channels": 4,
}  # fmt: skip
CLIP_L: dict[str, Any] = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "projection_dim": 768, "vocab_size": 49408,
}  # fmt: skip
CLIP_BIG_G: dict[str, Any] = {
    "hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20,
    "projection_dim": 1280, "vocab_size": 49408,
}  # fmt: skip
UNETS: dict[str, dict[str, Any]] = {
    "sd15": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sdxl": {
        "sample_size": 128, "cross_attention_dim": 2048, "attention_head_dim": (5, 10, 20),
        "block_out_channels": (320, 640, 1280), "transformer_layers_per_block": (1, 2, 10),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "use_linear_projection": True,
        "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}  # fmt: skip
# Stable Diffusion 3 medium; its third text encoder is optional and left out.
SD3: dict[str, Any] = {
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 24,
    "attention_head_dim": 64, "num_attention_heads": 24, "joint_attention_dim": 4096, "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048, "pos_embed_max_size": 192,
}  # fmt: skip


def random_pipeline(name: str, dtype: torch.dtype, device: str) -> Any:
    """A pipeline of ``sd15``, ``sdxl`` or ``sd3``, on a device, its weights as the layers initialise them."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(resolve_path(TOKENIZER), model_max_length=PROMPT_TOKENS)
    # A short vocabulary's ids are valid in the long one; only the end mark must be where the pooled state is taken.
    marks = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    if name == "sd3":
        return _sd3(tokenizer, marks, dtype, device)
    with torch.device(device):
        parts: dict[str, Any] = {
            "unet": UNet2DConditionModel(**UNETS[name]),
            "vae": AutoencoderKL(**VAE, sample_size=512),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**CLIP_L, **marks)),
        }
        if name == "sdxl":
            parts["text_encoder_2"] = CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_BIG_G, **marks))
    for part in parts.values():
        part.to(dtype)
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    if name == "sdxl":
        return StableDiffusionXLPipeline(**parts, tokenizer=tokenizer, tokenizer_2=tokenizer, scheduler=scheduler)
    return StableDiffusionPipeline(
        **parts, tokenizer=tokenizer, scheduler=scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def _sd3(tokenizer: Any, marks: dict[str, int], dtype: torch.dtype, device: str) -> StableDiffusion3Pipeline:
    with torch.device(device):
        parts: dict[str, Any] = {
            "transformer": SD3Transformer2DModel(**SD3),
            "vae": AutoencoderKL(
                **VAE | {"latent_channels": 16}, sample_size=1024, scaling_factor=1.5305, shift_factor=0.0609,
                use_quant_conv=False, use_post_quant_conv=False, force_upcast=True,
            ),
            "text_encoder": CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_L, **marks)),
            "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_BIG_G, **marks)),
        }  # fmt: skip
    for part in parts.values():
        part.to(dtype)
    return StableDiffusion3Pipeline(
        **parts, tokenizer=tokenizer, tokenizer_2=tokenizer, text_encoder_3=None, tokenizer_3=None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip
