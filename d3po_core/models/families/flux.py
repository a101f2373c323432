"""FLUX.1: packed latents, T5's states and CLIP's pooled state; its guidance is a number that the network is told."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import FluxPipeline

from d3po_core.models.families.family import Embedding, Guidance
from d3po_core.models.families.flow_family import FlowFamily
from d3po_core.models.families.flow_parts import PackedTransformer
from d3po_core.models.families.packing import packed, places, unpacked
from d3po_core.models.families.parts import Part, ShiftedVae

# The tokens that T5 reads. schnell, which is told no guidance, was distilled with fewer (its model card).
DEV_TOKENS, SCHNELL_TOKENS = 512, 256


class Flux(FlowFamily):
    """See Family."""

    PIPELINE: ClassVar[Any] = FluxPipeline
    TEXT_PARTS: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2")
    PARTS: ClassVar[dict[str, type[Part]]] = {"transformer": PackedTransformer, "vae": ShiftedVae}
    TEXT_WINDOWS: ClassVar[Mapping[str, int]] = {"tokenizer_2": DEV_TOKENS}
    FROM_ONE: ClassVar[bool] = True
    PACKED: ClassVar[int] = 4

    @property
    def guidance(self) -> Guidance:
        """Whether the network is told its guidance (dev) or was distilled without any (schnell)."""
        return "told" if self.pipeline.transformer.config.guidance_embeds else "none"

    @classmethod
    def call(cls, guidance: float, eta: float, network: Part | None) -> str:
        """Return the guidance, and for schnell the number of tokens, which its pipeline does not know."""
        schnell = isinstance(network, PackedTransformer) and not network.guidance_embeds
        return f"max_sequence_length={SCHNELL_TOKENS}," if schnell else f"guidance_scale={guidance},"

    @staticmethod
    def trained(shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Return whether the weights belong to a transformer with separate projections in single-stream blocks."""
        return any("single_transformer_blocks.0.attn.to_q." in name for name in shapes)

    def embed(self, prompt: str, device: torch.device) -> Embedding:
        """Return T5's states ``[L, D]`` and CLIP's pooled state ``[P]``."""
        tokens = DEV_TOKENS if self.guidance == "told" else SCHNELL_TOKENS
        text_1LD, pooled_1P, _ = self.pipeline.encode_prompt(prompt, device=device, max_sequence_length=tokens)
        return {"encoder_hidden_states": text_1LD[0], "pooled_projections": pooled_1P[0]}

    def predict(
        self,
        network: torch.nn.Module,
        latent_BCHW: torch.Tensor,
        t_B: torch.Tensor,
        embeddings: Embedding,
    ) -> torch.Tensor:
        """Return the transformer's velocity; text tokens have no place."""
        height, width = latent_BCHW.shape[-2:]
        text_places = latent_BCHW.new_zeros(embeddings["encoder_hidden_states"].shape[1], 3)
        velocity_BLK = network(
            hidden_states=packed(latent_BCHW), timestep=t_B / 1000, txt_ids=text_places,
            img_ids=places(height, width, latent_BCHW.device), **embeddings,
        ).sample  # fmt: skip
        return unpacked(velocity_BLK, height, width)
