"""Stable Diffusion 3: three text encoders, a transformer that predicts a velocity, and the flow's SDE as steps."""

from typing import Any, ClassVar

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

from d3po_core.ddim import Schedule
from d3po_core.families.family import Embedding
from d3po_core.families.parts import Part, ShiftedVae, Transformer
from d3po_core.families.stable_diffusion import StableDiffusion
from d3po_core.flow import make_flow_schedule


class StableDiffusion3(StableDiffusion):
    """See Family."""

    PIPELINE: ClassVar[Any] = StableDiffusion3Pipeline
    NETWORK: ClassVar[str] = "transformer"
    TEXT_PARTS: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2", "text_encoder_3")
    OPTIONAL_PARTS: ClassVar[tuple[str, ...]] = ("text_encoder_3",)
    PARTS: ClassVar[dict[str, type[Part]]] = {"transformer": Transformer, "vae": ShiftedVae}
    DRAWING: ClassVar[str] = "pipe = diffusers.DiffusionPipeline.from_pretrained({base})"
    STEP_NOISE: ClassVar[bool] = False  # its pipeline takes the flow's deterministic steps
    READS_TEXT_BY_ATTENTION_ALONE: ClassVar[bool] = False  # a pooled state joins the timestep
    REGIONS: ClassVar[tuple[str, ...]] = ("JointTransformerBlock",)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one latent: the size that the transformer was trained with."""
        config = self.pipeline.transformer.config
        return (config.in_channels, config.sample_size, config.sample_size)

    def schedule(self, num_steps: int, eta: float) -> Schedule:
        """Steps of the flow's SDE; ``eta`` is its noise level."""
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.pipeline.scheduler.config)
        return make_flow_schedule(scheduler, num_steps, eta)

    def embed(self, prompt: str, device: torch.device) -> Embedding:
        """States of the three encoders ``[L, D]`` and the pooled state ``[P]``."""
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
        """The transformer's velocity."""
        return network(hidden_states=latent_BCHW, timestep=t_B, **embeddings).sample

    @staticmethod
    def unscaled(latent_BCHW: torch.Tensor, config: Any) -> torch.Tensor:
        """Latents as the VAE decodes them."""
        return latent_BCHW / config.scaling_factor + config.shift_factor
