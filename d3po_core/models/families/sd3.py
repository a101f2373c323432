"""Stable Diffusion 3: three text encoders, a velocity-predicting transformer, and the flow's SDE as steps."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import StableDiffusion3Pipeline

from d3po_core.models.families.family import Embedding
from d3po_core.models.families.flow_family import FlowFamily
from d3po_core.models.families.parts import Part, ShiftedVae, Transformer
from d3po_core.models.families.qwen_image import QwenImage
from d3po_core.sizes import Grid


class StableDiffusion3(FlowFamily):
    """See Family."""

    PIPELINE: ClassVar[Any] = StableDiffusion3Pipeline
    TEXT_PARTS: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2", "text_encoder_3")
    OPTIONAL_PARTS: ClassVar[tuple[str, ...]] = ("text_encoder_3",)
    PARTS: ClassVar[dict[str, type[Part]]] = {"transformer": Transformer, "vae": ShiftedVae}
    PRECISIONS: ClassVar[tuple[str, ...]] = ("no", "fp16", "bf16")
    TEXT_WINDOWS: ClassVar[Mapping[str, int]] = {"tokenizer_3": 256}
    REGIONS: ClassVar[tuple[str, ...]] = ("JointTransformerBlock",)

    @property
    def grid(self) -> Grid:
        """Multiples of a patch, as far as the network knows places."""
        config, grid = self.pipeline.transformer.config, super().grid
        return Grid(grid.family, grid.step, config.pos_embed_max_size * grid.step)

    @staticmethod
    def trained(shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Return whether the weights belong to a transformer whose blocks see text and image at once."""
        return (
            not QwenImage.trained(shapes)
            and any(name.startswith("transformer.transformer_blocks.0.attn.to") for name in shapes)
            and not any("single_transformer_blocks." in name for name in shapes)
        )

    def embed(self, prompt: str, device: torch.device) -> Embedding:
        """Return states of the three encoders ``[L, D]`` and the pooled state ``[P]``."""
        text_1LD, _, pooled_1P, _ = self.pipeline.encode_prompt(
            prompt, None, None, device=device, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": text_1LD[0], "pooled_projections": pooled_1P[0]}

    def predict(
        self,
        network: torch.nn.Module,
        latent_BCHW: torch.Tensor,
        t_B: torch.Tensor,
        embeddings: Embedding,
    ) -> torch.Tensor:
        """Return the transformer's velocity."""
        return network(hidden_states=latent_BCHW, timestep=t_B, **embeddings).sample
