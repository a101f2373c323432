"""Stable Diffusion 3: three text encoders, a velocity-predicting transformer, and the flow's SDE as steps."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

from d3po_core.denoising.ddim import Schedule
from d3po_core.denoising.flow import default_noise_level, flow_chain_of, make_flow_schedule
from d3po_core.errors import D3POError
from d3po_core.models.families.family import Embedding
from d3po_core.models.families.parts import Part, ShiftedVae, Transformer
from d3po_core.models.families.stable_diffusion import StableDiffusion


class StableDiffusion3(StableDiffusion):
    """See Family."""

    PIPELINE: ClassVar[Any] = StableDiffusion3Pipeline
    NETWORK: ClassVar[str] = "transformer"
    TEXT_PARTS: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2", "text_encoder_3")
    OPTIONAL_PARTS: ClassVar[tuple[str, ...]] = ("text_encoder_3",)
    PARTS: ClassVar[dict[str, type[Part]]] = {"transformer": Transformer, "vae": ShiftedVae}
    LEFT_OUT: ClassVar[dict[str, Any]] = {}
    DRAWING: ClassVar[str] = "pipe = diffusers.DiffusionPipeline.from_pretrained({base})"
    STEP_NOISE: ClassVar[bool] = False  # its pipeline takes the flow's deterministic steps
    READS_TEXT_BY_ATTENTION_ALONE: ClassVar[bool] = False  # a pooled state joins the timestep
    REGIONS: ClassVar[tuple[str, ...]] = ("JointTransformerBlock",)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one latent: the size that the transformer was trained with."""
        config = self.pipeline.transformer.config
        return (config.in_channels, config.sample_size, config.sample_size)

    @staticmethod
    def trained(shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Return whether the weights belong to a transformer whose blocks see text and image at once."""
        return any("transformer_blocks.0.attn.to" in name for name in shapes)

    def schedule(self, num_steps: int, eta: float) -> Schedule:
        """Return the steps of the flow's SDE; ``eta`` is its noise level."""
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.pipeline.scheduler.config)
        return make_flow_schedule(scheduler, num_steps, eta)

    @staticmethod
    def chain(config: Mapping[str, Any], prediction_type: str | None = None, zero_snr: bool | None = None) -> Any:
        """Return the flow's Euler steps; other solvers choose other noise levels and are refused."""
        if prediction_type or zero_snr is not None:
            raise D3POError("model.prediction_type and model.zero_terminal_snr are for models with a UNet; this one "
                            "predicts a flow: leave them out")  # fmt: skip
        return flow_chain_of(config)

    @staticmethod
    def default_eta(num_steps: int, scheduler: Any) -> float:
        """Return the largest noise level that leaves no grain, at most Flow-GRPO's 0.7."""
        return default_noise_level(scheduler, num_steps)

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

    @staticmethod
    def unscaled(latent_BCHW: torch.Tensor, config: Any) -> torch.Tensor:
        """Return latents in the scale that the VAE decodes."""
        return latent_BCHW / config.scaling_factor + config.shift_factor
