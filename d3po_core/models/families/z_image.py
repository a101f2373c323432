"""Z-Image: one language model's states of any length, and a transformer that predicts against the flow."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import ZImagePipeline

from d3po_core.models.families.family import Embedding
from d3po_core.models.families.flow_family import FlowFamily
from d3po_core.models.families.flow_parts import PatchTransformer
from d3po_core.models.families.padded import MASK, STATES, stack_padded
from d3po_core.models.families.parts import Part, ShiftedVae


class ZImage(FlowFamily):
    """See Family. Its pipeline adds guidance to the prompt's own prediction, so it calls our scale less 1 its own."""

    PIPELINE: ClassVar[Any] = ZImagePipeline
    TEXT_PARTS: ClassVar[tuple[str, ...]] = ("text_encoder",)
    PARTS: ClassVar[dict[str, type[Part]]] = {"transformer": PatchTransformer, "vae": ShiftedVae}
    TEXT_WINDOWS: ClassVar[Mapping[str, int]] = {"tokenizer": 512}
    FROM_ONE: ClassVar[bool] = True
    stack = staticmethod(stack_padded)

    @classmethod
    def call(cls, guidance: float, eta: float, network: Part | None) -> str:
        """Return the guidance as the pipeline counts it, from 0."""
        return f"guidance_scale={guidance - 1},"

    @staticmethod
    def trained(shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Return whether the weights belong to a transformer of single-stream layers."""
        return any(name.startswith(("layers.0.attention", "transformer.layers.0.attention")) for name in shapes)

    def embed(self, prompt: str, device: torch.device) -> Embedding:
        """Return the language model's states ``[L, D]``, without padding."""
        (text_LD,), _ = self.pipeline.encode_prompt(prompt, device=device, do_classifier_free_guidance=False)
        return {STATES: text_LD}

    def predict(
        self,
        network: torch.nn.Module,
        latent_BCHW: torch.Tensor,
        t_B: torch.Tensor,
        embeddings: Embedding,
    ) -> torch.Tensor:
        """Return the velocity; the transformer counts time towards the image and predicts the opposite."""
        text_BLD = embeddings[STATES]
        texts = list(text_BLD)
        if MASK in embeddings:  # its learned padding is part of what it attends to, so texts go in as they are
            texts = [text[:length] for text, length in zip(text_BLD, embeddings[MASK].sum(1).tolist(), strict=True)]
        against = network(list(latent_BCHW.unsqueeze(2)), (1000 - t_B) / 1000, texts).sample
        return -torch.stack(against).squeeze(2)
