"""FLUX.2 klein: three layers of a language model as text, and latents kept as normed patches of 2 x 2."""

import json
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import Flux2KleinPipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

from d3po_core.models.families.family import Embedding, Guidance
from d3po_core.models.families.flow_family import FlowFamily
from d3po_core.models.families.flow_parts import Flux2Transformer, Flux2Vae
from d3po_core.models.families.parts import Part


class Flux2Klein(FlowFamily):
    """See Family."""

    PIPELINE: ClassVar[Any] = Flux2KleinPipeline
    TEXT_PARTS: ClassVar[tuple[str, ...]] = ("text_encoder",)
    PARTS: ClassVar[dict[str, type[Part]]] = {"transformer": Flux2Transformer, "vae": Flux2Vae}
    TEXT_WINDOWS: ClassVar[Mapping[str, int]] = {"tokenizer": 512}
    # Most of its blocks have one projection for queries, keys, values and the feed-forward's input.
    LORA_TARGETS: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj")
    COMFYUI: ClassVar[bool] = False  # it reads the authors' names alone (export/native_names.py)
    FROM_ONE: ClassVar[bool] = True
    PATCH: ClassVar[int] = 1
    ELEMENT: ClassVar[int] = 2  # stored latents are patches already

    @property
    def guidance(self) -> Guidance:
        """Two passes for the base models; none for the distilled ones."""
        return "none" if self.pipeline.config.is_distilled else "two passes"

    @classmethod
    def call_away(cls, negative_prompt: str) -> str:
        """Return the negative prompt's embedding, since the pipeline takes no text."""
        return (
            f"negative_prompt_embeds=pipe.encode_prompt({json.dumps(negative_prompt)})[0]," if negative_prompt else ""
        )

    @staticmethod
    def trained(shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Return whether the weights belong to a transformer with joined projections in single-stream blocks."""
        return any("single_transformer_blocks.0.attn.to_qkv_mlp_proj" in name for name in shapes)

    @staticmethod
    def shift(config: Mapping[str, Any], num_steps: int, tokens: int) -> float:
        """Return mu, which its authors fitted to the number of steps, too."""
        return compute_empirical_mu(image_seq_len=tokens, num_steps=num_steps)

    def embed(self, prompt: str, device: torch.device) -> Embedding:
        """Return states of three layers side by side ``[L, D]``, with the padding that the network is used to."""
        text_1LD, _ = self.pipeline.encode_prompt(prompt, device=device)
        return {"encoder_hidden_states": text_1LD[0]}

    def predict(
        self,
        network: torch.nn.Module,
        latent_BCHW: torch.Tensor,
        t_B: torch.Tensor,
        embeddings: Embedding,
    ) -> torch.Tensor:
        """Return the transformer's velocity; places are time, row, column and the text token's number."""
        count, _, height, width = latent_BCHW.shape
        zero, rows, columns, words = (
            torch.arange(n, device=latent_BCHW.device)
            for n in (1, height, width, embeddings["encoder_hidden_states"].shape[1])
        )
        text_places, image_places = (
            torch.cartesian_prod(*axes).expand(count, -1, -1)
            for axes in ((zero, zero, zero, words), (zero, rows, columns, zero))
        )
        velocity_BLC = network(
            hidden_states=latent_BCHW.flatten(2).transpose(1, 2), timestep=t_B / 1000, guidance=None,
            txt_ids=text_places, img_ids=image_places, **embeddings,
        ).sample  # fmt: skip
        return velocity_BLC.transpose(1, 2).unflatten(2, (height, width))

    def decode(self, latent_BCHW: torch.Tensor) -> torch.Tensor:
        """Return the VAE's images of latents with its mean and deviation, put together from their patches."""
        vae, (deviation_C11, mean_C11) = self.pipeline.vae, self._norm()
        patches = (latent_BCHW * deviation_C11 + mean_C11).unflatten(1, (-1, 2, 2))  # B C 2 2 H W
        latent_BCHW = patches.permute(0, 1, 4, 2, 5, 3).flatten(4).flatten(2, 3)
        return vae.decode(latent_BCHW.to(vae.dtype)).sample

    def encode(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        """Return the mean of the VAE's posterior as patches, without its mean and deviation."""
        vae, (deviation_C11, mean_C11) = self.pipeline.vae, self._norm()
        latent_BCHW = vae.encode(image_BCHW.to(vae.dtype)).latent_dist.mode().float()
        patches = latent_BCHW.unflatten(-1, (-1, 2)).unflatten(2, (-1, 2))  # B C H 2 W 2
        return (patches.permute(0, 1, 3, 5, 2, 4).flatten(1, 3) - mean_C11) / deviation_C11

    def _norm(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return deviation and mean of the VAE's patches per channel, ``[C, 1, 1]``."""
        vae, norm = self.pipeline.vae, self.pipeline.vae.bn
        deviation_C = (norm.running_var + vae.config.batch_norm_eps).sqrt()
        return deviation_C[:, None, None].float(), norm.running_mean[:, None, None].float()
