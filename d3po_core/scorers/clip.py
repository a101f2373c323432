"""Scorers built on CLIP: the cosine of image and prompt, and a head on the image's embedding.

Sources: CLIPScore, arXiv 2104.08718; PickScore, arXiv 2305.01569; HPSv2, arXiv 2306.09341; the aesthetic head
"sac+logos+ava1-l14-linearMSE" of the LAION aesthetic predictor. B images, T tokens, F features.
"""

import re

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from d3po_core.scorers.reading import Head, State, head_state, names_in, read_model
from d3po_core.scorers.sources import Source

HEAD_FILE = "head.safetensors"


class Similarity(torch.nn.Module):
    """A factor times the cosine between CLIP's embeddings of an image and its prompt.

    ``clip_score``: 100, without the published clamp at 0, below which images would tie. ``pickscore``: CLIP's learned
    factor, about 100. ``hpsv2``: 1, as published.
    """

    def __init__(self, source: Source, dtype: torch.dtype, scale: float | None) -> None:
        super().__init__()
        config = CLIPConfig.from_pretrained(source.place_of("config.json"))
        authors = "visual.conv1.weight" in names_in(source)
        state = open_clip_names(load_file(source.weights())) if authors else None
        model = read_model(CLIPModel, source, config, state)
        self._scale = float(model.logit_scale.exp()) if scale is None else scale
        self._model = model.to(dtype)
        self._processor = CLIPImageProcessorPil.from_pretrained(source.place_of("preprocessor_config.json"))
        self._tokenizer = CLIPTokenizer.from_pretrained(source.place_of("tokenizer_config.json"))
        self._most_tokens = config.text_config.max_position_embeddings

    def forward(self, images: np.ndarray, prompts: list[str]) -> torch.Tensor:
        """Return scores ``[B]``; prompts are cut at CLIP's length."""
        distinct = list(dict.fromkeys(prompts))
        tokens = self._tokenizer(
            distinct, padding="max_length", truncation=True, max_length=self._most_tokens, return_tensors="pt"
        ).to(self._model.device)
        text_PF = self._model.get_text_features(**tokens).pooler_output
        image_BF = self._model.get_image_features(pixels(self._processor, images, self._model)).pooler_output
        text_BF = text_PF[[distinct.index(prompt) for prompt in prompts]]
        return self._scale * torch.cosine_similarity(image_BF.float(), text_BF.float())


class Aesthetic(torch.nn.Module):
    """A linear head on CLIP's unit-length image embedding: about 1 (ugly) to 10; ignores prompts."""

    def __init__(self, source: Source, dtype: torch.dtype) -> None:
        super().__init__()
        place = source.place_of("preprocessor_config.json")
        config = CLIPVisionConfig.from_pretrained(place)
        model = read_model(CLIPVisionModelWithProjection, source, config, place=place)
        state = head_state(load_file(source.find(HEAD_FILE) or source.weights()))
        self._head = Head(source, state, config.projection_dim)
        self._model = model.to(dtype)
        self._processor = CLIPImageProcessorPil.from_pretrained(place)

    def forward(self, images: np.ndarray, prompts: list[str]) -> torch.Tensor:
        """Return scores ``[B]``."""
        image_BF = self._model(pixels(self._processor, images, self._model)).image_embeds.float()
        return self._head(torch.nn.functional.normalize(image_BF, dim=1))


def pixels(processor: CLIPImageProcessorPil, images: np.ndarray, model: torch.nn.Module) -> torch.Tensor:
    """Preprocess uint8 images ``[B, height, width, 3]`` to a model's input, on its device and in its precision."""
    parameter = next(model.parameters())
    shown = processor(images=list(images), input_data_format="channels_last", return_tensors="pt")["pixel_values"]
    return shown.to(parameter.device, parameter.dtype)


_OPEN_CLIP_NAMES = (
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.attn\.out_proj\.", ".self_attn.out_proj."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.weight"),
)


def open_clip_names(state: State) -> State:
    """Rename open_clip's weights, the format of HPSv2, to those of transformers' CLIPModel."""
    renamed: State = {}
    for name, tensor in state.items():
        fused = re.match(r"(.*)\.attn\.in_proj_(weight|bias)$", name)
        parts = {name: tensor}
        if fused:  # queries, keys and values in one matrix
            block, kind = fused.groups()
            parts = {
                f"{block}.self_attn.{part}_proj.{kind}": rows for part, rows in zip("qkv", tensor.chunk(3), strict=True)
            }
        elif name in ("visual.proj", "text_projection"):  # open_clip stores it transposed
            parts = {name: tensor.T}
        for key, value in parts.items():
            for pattern, replacement in _OPEN_CLIP_NAMES:
                key = re.sub(pattern, replacement, key)
            renamed[key] = value.contiguous()
    return renamed
