"""Qwen-Image: a vision-language model's states, packed latents, a VAE for video, and guidance that keeps its length."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import QwenImagePipeline

from d3po_core.models.families.family import Embedding
from d3po_core.models.families.flow_family import FlowFamily
from d3po_core.models.families.flow_parts import QwenTransformer, QwenVae
from d3po_core.models.families.packing import packed, unpacked
from d3po_core.models.families.padded import STATES, stack_padded
from d3po_core.models.families.parts import Part

WIDTH = 3072  # of the published transformer's tokens; Stable Diffusion 3's are narrower


class QwenImage(FlowFamily):
    """See Family. Guidance leads away from a single space, as its authors do."""

    PIPELINE: ClassVar[Any] = QwenImagePipeline
    TEXT_PARTS: ClassVar[tuple[str, ...]] = ("text_encoder",)
    PARTS: ClassVar[dict[str, type[Part]]] = {"transformer": QwenTransformer, "vae": QwenVae}
    TEXT_WINDOWS: ClassVar[Mapping[str, int]] = {"tokenizer": 1024}
    FROM_ONE: ClassVar[bool] = True
    stack = staticmethod(stack_padded)
    PACKED: ClassVar[int] = 4

    @classmethod
    def call(cls, guidance: float, eta: float, network: Part | None) -> str:
        """Return the guidance under the pipeline's name."""
        return f"true_cfg_scale={guidance},"

    @classmethod
    def call_away(cls, negative_prompt: str) -> str:
        """Return the negative prompt; without any, its authors' space, since the pipeline does not guide without."""
        return super().call_away(negative_prompt or " ")

    @staticmethod
    def trained(shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Return whether the weights belong to a transformer of two streams as wide as the published one's."""
        wide = any(name.endswith("to_q.lora_A.weight") and shape[-1] == WIDTH for name, shape in shapes.items())
        single = any("single_transformer_blocks." in name for name in shapes)
        return wide and not single and any(name.startswith("transformer.transformer_blocks.0.attn.") for name in shapes)

    def embed(self, prompt: str, device: torch.device) -> Embedding:
        """Return the language model's states ``[L, D]``, without padding."""
        text_1LD, _ = self.pipeline.encode_prompt(prompt or " ", device=device)
        return {STATES: text_1LD[0]}

    @staticmethod
    def guide(without_BCHW: torch.Tensor, with_BCHW: torch.Tensor, scale: float) -> torch.Tensor:
        """Return the guided prediction, in which each token keeps the length of the prompt's own."""
        own_BLK = packed(with_BCHW)
        guided_BLK = packed(without_BCHW + scale * (with_BCHW - without_BCHW))
        lengths = [x_BLK.norm(dim=-1, keepdim=True) for x_BLK in (own_BLK, guided_BLK)]
        return unpacked(guided_BLK * (lengths[0] / lengths[1]), *with_BCHW.shape[-2:])

    def predict(
        self,
        network: torch.nn.Module,
        latent_BCHW: torch.Tensor,
        t_B: torch.Tensor,
        embeddings: Embedding,
    ) -> torch.Tensor:
        """Return the transformer's velocity."""
        height, width = latent_BCHW.shape[-2:]
        velocity_BLK = network(
            hidden_states=packed(latent_BCHW), timestep=t_B / 1000,
            img_shapes=[[(1, height // 2, width // 2)]] * len(latent_BCHW), **embeddings,
        ).sample  # fmt: skip
        return unpacked(velocity_BLK, height, width)

    def decode(self, latent_BCHW: torch.Tensor) -> torch.Tensor:
        """Return the images of a VAE for video: each is a film of one frame."""
        vae = self.pipeline.vae
        return vae.decode(self.unscaled(latent_BCHW, vae.config)[:, :, None].to(vae.dtype)).sample[:, :, 0]

    def encode(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        """Return the mean of the posterior of a film of one frame, in the scale of the network."""
        vae = self.pipeline.vae
        mean_BCHW = vae.encode(image_BCHW[:, :, None].to(vae.dtype)).latent_dist.mode()[:, :, 0]
        return self.scaled(mean_BCHW.float(), vae.config)

    @staticmethod
    def scaled(latent_BCHW: torch.Tensor, config: Any) -> torch.Tensor:
        """Return the VAE's latents in the scale of the network; undoes ``unscaled``."""
        mean_C11, std_C11 = (
            latent_BCHW.new_tensor(v)[:, None, None] for v in (config.latents_mean, config.latents_std)
        )
        return (latent_BCHW - mean_C11) / std_C11

    @staticmethod
    def unscaled(latent_BCHW: torch.Tensor, config: Any) -> torch.Tensor:
        """Return latents in the scale that the VAE decodes."""
        mean_C11, std_C11 = (
            latent_BCHW.new_tensor(v)[:, None, None] for v in (config.latents_mean, config.latents_std)
        )
        return latent_BCHW * std_C11 + mean_C11
