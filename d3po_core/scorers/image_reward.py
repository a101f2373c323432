"""ImageReward: BLIP reads the prompt together with the image, and a head turns its first token into a score.

The authors' package needs an old transformers; here BLIP is transformers' own, and the weights keep the authors' names.
As in their code: 35 tokens, always padded; CLIP's image preprocessing; the head on the first token; mean and deviation.
Source: arXiv 2304.05977 and its authors' code. B images, S patches, F features.
"""

import re
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import BertTokenizer, BlipConfig, BlipPreTrainedModel, BlipTextModel, BlipVisionModel
from transformers import CLIPImageProcessorPil as ImageProcessor

from d3po_core.scorers.clip import pixels
from d3po_core.scorers.reading import Head, State, head_state, read_model
from d3po_core.scorers.sources import Source

TOKENS = 35
MEAN, DEVIATION = 0.16717362830052426, 1.0333394966054072

# BLIP with the large vision transformer, as in ImageReward-v1.0.
PUBLISHED: dict[str, dict[str, Any]] = {
    "vision_config": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "image_size": 224, "patch_size": 16, "layer_norm_eps": 1e-6,
    },
    "text_config": {
        "vocab_size": 30524, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12,
        "num_attention_heads": 12, "max_position_embeddings": 512, "layer_norm_eps": 1e-12,
    },
}  # fmt: skip


class _Blip(BlipPreTrainedModel):
    """The two parts of BLIP that ImageReward uses."""

    def __init__(self, config: BlipConfig) -> None:
        super().__init__(config)
        self.vision_model = BlipVisionModel(config.vision_config)
        self.text_encoder = BlipTextModel(config.text_config, add_pooling_layer=False)
        self.post_init()


class ImageReward(torch.nn.Module):
    """A score of an image's fit to its prompt and its appeal: mean about 0, standard deviation about 1."""

    def __init__(self, source: Source, dtype: torch.dtype) -> None:
        super().__init__()
        own = source.find("config.json")
        config = BlipConfig.from_pretrained(own) if own else BlipConfig(**PUBLISHED)
        state = load_file(source.weights())
        model = read_model(_Blip, source, config, authors_names(state))
        self._head = Head(source, head_state(state, "mlp."), config.text_config.hidden_size)
        self._model = model.to(dtype)
        size = config.vision_config.image_size
        self._processor = ImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
        self._tokenizer = BertTokenizer.from_pretrained(source.place_of("tokenizer_config.json"))

    def forward(self, images: np.ndarray, prompts: list[str]) -> torch.Tensor:
        """Return scores ``[B]``; prompts are cut at 35 tokens."""
        tokens = self._tokenizer(
            prompts, padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
        ).to(self._model.device)
        seen_BSF = self._model.vision_model(pixels(self._processor, images, self._model)).last_hidden_state
        read = self._model.text_encoder(
            tokens.input_ids, attention_mask=tokens.attention_mask, encoder_hidden_states=seen_BSF
        )
        return (self._head(read.last_hidden_state[:, 0]) - MEAN) / DEVIATION


_NAMES = (
    (r"^blip\.", ""),
    (r"^visual_encoder\.cls_token$", "vision_model.embeddings.class_embedding"),
    (r"^visual_encoder\.pos_embed$", "vision_model.embeddings.position_embedding"),
    (r"^visual_encoder\.patch_embed\.proj\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual_encoder\.norm\.", "vision_model.post_layernorm."),
    (r"^visual_encoder\.blocks\.(\d+)\.norm([12])\.", r"vision_model.encoder.layers.\1.layer_norm\2."),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.qkv\.", r"vision_model.encoder.layers.\1.self_attn.qkv."),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"vision_model.encoder.layers.\1.self_attn.projection."),
    (r"^visual_encoder\.blocks\.(\d+)\.mlp\.", r"vision_model.encoder.layers.\1.mlp."),
)


def authors_names(state: State) -> State:
    """Return BLIP's weights under transformers' names, without the head and pretraining-only weights."""
    renamed: State = {}
    for name, tensor in state.items():
        key = name
        for pattern, replacement in _NAMES:
            key = re.sub(pattern, replacement, key)
        if key.startswith(("vision_model.", "text_encoder.")) and not key.endswith("position_ids"):
            renamed[key] = tensor
    return renamed
