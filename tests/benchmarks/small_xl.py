"""The embedded model's weights in Stable Diffusion XL's architecture: a small model of that family that can draw.

What XL adds (a second text encoder beside the first, its pooled state, the image's size and crop) reads its inputs and
starts with weights of zero. XL takes a text encoder's states before its last layer and without the final norm: an idle
layer is added, and the norm is folded into what reads the text, with one scale for all words. Not the same function as
the embedded model's, but one that draws about as much right.
"""

from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from d3po_core.paths import resolve_path
from d3po_core.scorers.shapes import all_scenes

NUM_TIME_IDS, TIME_ID_WIDTH = 6, 8


def make_small_xl(folder: Path) -> Path:
    """Write the model into a folder; returns the folder."""
    small = StableDiffusionPipeline.from_pretrained(resolve_path("data/shapes/model"), torch_dtype=torch.float32)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        second = CLIPTextModelWithProjection(small.text_encoder.config)
        unet = _unet(small, second.config.hidden_size, second.config.projection_dim)
        text_encoder = _with_idle_layer(small.text_encoder)
    StableDiffusionXLPipeline(
        unet=unet, vae=small.vae, text_encoder=text_encoder, text_encoder_2=second, tokenizer=small.tokenizer,
        tokenizer_2=small.tokenizer, scheduler=small.scheduler, force_zeros_for_empty_prompt=False,
    ).save_pretrained(folder)  # fmt: skip
    return folder


def _with_idle_layer(small: CLIPTextModel) -> CLIPTextModel:
    config = small.config.to_dict() | {"num_hidden_layers": small.config.num_hidden_layers + 1}
    encoder = CLIPTextModel(CLIPTextConfig(**config))
    encoder.load_state_dict(small.state_dict(), strict=False)
    return encoder


def _unet(small: StableDiffusionPipeline, second_width: int, pooled_width: int) -> UNet2DConditionModel:
    config = dict(small.unet.config) | {
        "cross_attention_dim": small.unet.config.cross_attention_dim + second_width, "use_linear_projection": True,
        "addition_embed_type": "text_time", "addition_time_embed_dim": TIME_ID_WIDTH,
        "projection_class_embeddings_input_dim": NUM_TIME_IDS * TIME_ID_WIDTH + pooled_width,
    }  # fmt: skip
    unet = UNet2DConditionModel.from_config({k: v for k, v in config.items() if not k.startswith("_")})
    known, norm_DD, shift_D = small.unet.state_dict(), *_final_norm(small)
    for name, weight in unet.state_dict().items():
        if name not in known:
            if name.startswith("add_embedding.linear_2"):
                weight.zero_()
        elif ".attn2.to_k" in name or ".attn2.to_v" in name:  # the second encoder's states come last
            weight.zero_()
            weight[:, : len(norm_DD)] = known[name] @ norm_DD
        elif name.endswith(".attn2.to_out.0.bias"):  # what the norm adds to the values; softmax ignores it in the keys
            values, out = (known[name.replace("to_out.0.bias", part)] for part in ("to_v.weight", "to_out.0.weight"))
            weight.copy_(known[name] + out @ values @ shift_D)
        else:
            weight.copy_(known[name].reshape(weight.shape))
    return unet


def _final_norm(small: StableDiffusionPipeline) -> tuple[torch.Tensor, torch.Tensor]:
    """The text encoder's final norm as a matrix and a shift, with the mean of its scales over all words."""
    encoder = small.text_encoder
    texts = [scene.prompt for scene in all_scenes()]
    tokens = small.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    states = encoder(tokens, output_hidden_states=True).hidden_states[-1].flatten(0, 1)
    norm = next(module for name, module in encoder.named_modules() if name.endswith("final_layer_norm"))
    width = states.shape[1]
    centred = torch.eye(width) - 1 / width
    return norm.weight[:, None] * centred / states.std(dim=1, unbiased=False).mean(), norm.bias
