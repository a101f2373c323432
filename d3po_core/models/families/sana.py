"""SANA 1.5: a small language model's states with a mask, linear attention, and a VAE that compresses 32-fold."""

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import SanaPipeline

from d3po_core.denoising.flow import flow_chain_of, flow_levels_of
from d3po_core.models.families.family import Embedding
from d3po_core.models.families.flow_family import FlowFamily
from d3po_core.models.families.flow_parts import DeepVae, SanaTransformer
from d3po_core.models.families.parts import Part

# The request that the pipeline puts before every prompt but the empty one.
INSTRUCTION = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default


class Sana(FlowFamily):
    """See Family."""

    PIPELINE: ClassVar[Any] = SanaPipeline
    TEXT_PARTS: ClassVar[tuple[str, ...]] = ("text_encoder",)
    PARTS: ClassVar[dict[str, type[Part]]] = {"transformer": SanaTransformer, "vae": DeepVae}
    TEXT_WINDOWS: ClassVar[Mapping[str, int]] = {"tokenizer": 300}
    COMFYUI: ClassVar[bool] = False
    PATCH: ClassVar[int] = 1
    # Its folders come with a solver; the trained steps are Euler's at the same shift.
    DRAWING: ClassVar[str] = """\
pipe = diffusers.DiffusionPipeline.from_pretrained({base})
steps = pipe.scheduler.config
pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=steps.get("flow_shift") or steps["shift"])"""

    @classmethod
    def call_size(cls, height: int, width: int) -> str:
        """Return the size, and that the pipeline must not draw its nearest published one instead."""
        return f"{super().call_size(height, width)}\n    use_resolution_binning=False,"

    @staticmethod
    def trained(shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Return whether the weights belong to a transformer with two attentions per block."""
        return any(".transformer_blocks.0.attn1.to_" in f".{name}" for name in shapes) and not any(
            "attentions" in name for name in shapes
        )

    @staticmethod
    def chain(config: Mapping[str, Any], prediction_type: str | None = None, zero_snr: bool | None = None) -> Any:
        """Return the flow's Euler steps with the shift of the folder's solver, which has the same noise levels."""
        FlowFamily.refuse_unet_settings(prediction_type, zero_snr)
        return flow_chain_of(flow_levels_of(config))

    def embed(self, prompt: str, device: torch.device) -> Embedding:
        """Return the language model's states ``[L, D]`` and their mask ``[L]``."""
        return self._embed(prompt, device, INSTRUCTION if prompt else None)

    def embed_negative(self, prompt: str, device: torch.device) -> Embedding:
        """Return the negative prompt's embedding, before which the pipeline puts no instruction."""
        return self._embed(prompt, device, None)

    def _embed(self, prompt: str, device: torch.device, instruction: list[str] | None) -> Embedding:
        text_1LD, mask_1L, _, _ = self.pipeline.encode_prompt(
            prompt, do_classifier_free_guidance=False, device=device, complex_human_instruction=instruction
        )
        return {"encoder_hidden_states": text_1LD[0], "encoder_attention_mask": mask_1L[0]}

    def predict(
        self,
        network: torch.nn.Module,
        latent_BCHW: torch.Tensor,
        t_B: torch.Tensor,
        embeddings: Embedding,
    ) -> torch.Tensor:
        """Return the transformer's velocity."""
        timestep_B = t_B * self.pipeline.transformer.config.timestep_scale
        return network(latent_BCHW, timestep=timestep_B, **embeddings).sample

    def encode(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        """Return the VAE's latents, which are no distribution, in the scale of the network."""
        vae = self.pipeline.vae
        return self.scaled(vae.encode(image_BCHW.to(vae.dtype)).latent.float(), vae.config)

    @staticmethod
    def scaled(latent_BCHW: torch.Tensor, config: Any) -> torch.Tensor:
        """Return the VAE's latents in the scale of the network; undoes ``unscaled``."""
        return latent_BCHW * config.scaling_factor

    @staticmethod
    def unscaled(latent_BCHW: torch.Tensor, config: Any) -> torch.Tensor:
        """Return latents in the scale that the VAE decodes."""
        return latent_BCHW / config.scaling_factor
