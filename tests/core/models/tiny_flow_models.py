"""Small random models of the flow-matching families, written as the hub's folders; latents of 8 x 8 or 16 x 16."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

from tests.core.models.tiny_models import WIDTH, small_vae, text_config, tokenizer

SIDE = 8
# As FLUX.1-dev's, Qwen-Image's and others' files have them.
DYNAMIC: dict[str, Any] = {
    "use_dynamic_shifting": True, "shift": 3.0, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}  # fmt: skip


def side_of(name: str) -> int:
    """The side of a model's latents, as its VAE counts them."""
    return 2 * SIDE if name == "sana" else SIDE  # SANA's pipeline takes multiples of 32 pixels


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
    config.write_text(json.dumps({**json.loads(config.read_text()), "sample_size": side_of(name)}))
    return folder


def vae(latent_channels: int, **more: Any) -> AutoencoderKL:
    """A small VAE whose latents are shifted and scaled."""
    return small_vae(
        latent_channels, shift_factor=0.1, scaling_factor=0.4, use_quant_conv=False, use_post_quant_conv=False, **more
    )


def _flux(guidance: bool) -> FluxPipeline:
    marks = tokenizer()
    t5 = T5Config(vocab_size=len(marks), d_model=WIDTH, d_kv=8, d_ff=WIDTH, num_layers=1, num_heads=2)
    return FluxPipeline(
        transformer=FluxTransformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, guidance_embeds=guidance, axes_dims_rope=(4, 6, 6),
        ),
        vae=vae(4), text_encoder=CLIPTextModel(text_config()), text_encoder_2=T5EncoderModel(t5), tokenizer=marks,
        tokenizer_2=tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(**(DYNAMIC if guidance else {"shift": 1.0})),
    )  # fmt: skip


def _sd35() -> StableDiffusion3Pipeline:
    """What 3.5 has and 3 lacks: a second attention in some blocks, normed queries and keys; and all three encoders."""
    marks = tokenizer()
    t5 = T5Config(vocab_size=len(marks), d_model=2 * WIDTH, d_kv=8, d_ff=WIDTH, num_layers=1, num_heads=2)
    encoders = {f"text_encoder{n}": CLIPTextModelWithProjection(text_config()) for n in ("", "_2")}
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=SIDE, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
            joint_attention_dim=2 * WIDTH, caption_projection_dim=32, pooled_projection_dim=2 * WIDTH,
            dual_attention_layers=(0,), qk_norm="rms_norm",
        ),
        vae=vae(4), **encoders, text_encoder_3=T5EncoderModel(t5), tokenizer=marks, tokenizer_2=tokenizer(),
        tokenizer_3=tokenizer(), scheduler=FlowMatchEulerDiscreteScheduler(**DYNAMIC),
    )  # fmt: skip


def _chatty() -> CLIPTokenizer:
    """A tokenizer with a template of conversations, as language models have it."""
    marks = tokenizer()
    marks.chat_template = "{% for m in messages %}user {{ m['content'] }} {% endfor %}assistant"
    return marks


def _language_model(layers: int = 2) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer()), "hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": layers,
        "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 2048,
    }  # fmt: skip


def _qwen() -> QwenImagePipeline:
    text = {**_language_model(), "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH}
    return QwenImagePipeline(
        transformer=QwenImageTransformer2DModel(
            in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=WIDTH, axes_dims_rope=(4, 6, 6),
        ),
        vae=AutoencoderKLQwenImage(
            base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
            latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 2.0, 0.8, 1.0],
        ),
        text_encoder=Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)),
        tokenizer=_chatty(), scheduler=FlowMatchEulerDiscreteScheduler(**DYNAMIC, shift_terminal=0.02),
    )  # fmt: skip


def _z_image() -> ZImagePipeline:
    return ZImagePipeline(
        transformer=ZImageTransformer2DModel(
            in_channels=4, dim=64, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=WIDTH,
            axes_dims=[8, 12, 12], axes_lens=[512, 64, 64],
        ),
        vae=vae(4), text_encoder=Qwen3Model(Qwen3Config(**_language_model())), tokenizer=_chatty(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip


def _sana() -> SanaPipeline:
    return SanaPipeline(
        transformer=SanaTransformer2DModel(
            in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2,
            num_cross_attention_heads=2, cross_attention_head_dim=16, cross_attention_dim=32, caption_channels=WIDTH,
            sample_size=2 * SIDE, qk_norm="rms_norm_across_heads", timestep_scale=0.5,
        ),
        vae=AutoencoderDC(
            latent_channels=4, attention_head_dim=4, encoder_block_out_channels=(8, 8), scaling_factor=0.4,
            decoder_block_out_channels=(8, 8), encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1),
            encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()),
        ),
        text_encoder=Gemma2Model(Gemma2Config(**_language_model())), tokenizer=tokenizer(),
        scheduler=DPMSolverMultistepScheduler(
            use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
        ),
    )  # fmt: skip


def _klein(distilled: bool) -> Flux2KleinPipeline:
    kind = AutoencoderKLFlux2(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1,
    )  # fmt: skip
    kind.bn.running_mean.normal_()
    kind.bn.running_var.uniform_(0.5, 2)
    return Flux2KleinPipeline(
        transformer=Flux2Transformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=3 * 16, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        ),
        vae=kind, text_encoder=Qwen3ForCausalLM(Qwen3Config(**{**_language_model(28), "hidden_size": 16})),
        tokenizer=_chatty(), scheduler=FlowMatchEulerDiscreteScheduler(**DYNAMIC), is_distilled=distilled,
    )  # fmt: skip


MADE: dict[str, Callable[[], Any]] = {
    "flux-dev": lambda: _flux(True),
    "flux-schnell": lambda: _flux(False),
    "sd35": _sd35,
    "qwen": _qwen,
    "z-image": _z_image,
    "sana": _sana,
    "klein": lambda: _klein(True),
    "klein-base": lambda: _klein(False),
}
FLOW_NAMES = tuple(MADE)
