"""What flow-matching families share: Euler's noise levels as the pipeline sets them, and the flow's SDE as steps."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from d3po_core.denoising.ddim import Schedule
from d3po_core.denoising.flow import Levels, default_noise_level, flow_chain_of, make_flow_schedule
from d3po_core.errors import D3POError
from d3po_core.models.families.flow_parts import native_side
from d3po_core.models.families.parts import Part
from d3po_core.models.families.stable_diffusion import StableDiffusion


class FlowFamily(StableDiffusion):
    """See Family; a transformer that predicts a velocity."""

    NETWORK: ClassVar[str] = "transformer"
    LEFT_OUT: ClassVar[dict[str, Any]] = {}
    REGIONS: ClassVar[tuple[str, ...]] = ()
    PRECISIONS: ClassVar[tuple[str, ...]] = ("no", "bf16")  # fp16 ends at 65,504, which their activations exceed
    READS_TEXT_BY_ATTENTION_ALONE: ClassVar[bool] = False
    DRAWING: ClassVar[str] = "pipe = diffusers.DiffusionPipeline.from_pretrained({base})"
    COMFYUI: ClassVar[bool] = True

    PATCH: ClassVar[int] = 2
    PACKED: ClassVar[int] = 1
    """Elements of a stored latent that the network reads as one, side by side in its channels."""
    FROM_ONE: ClassVar[bool] = False
    """Whether the pipeline spaces noise levels from 1 to 1/T itself."""

    @classmethod
    def call(cls, guidance: float, eta: float, network: Part | None) -> str:
        """Return the guidance under the pipeline's name; pipelines take the flow's deterministic steps."""
        return f"guidance_scale={guidance},"

    def windows(self, prompt: str) -> int:
        """Return 1: language models read prompts whole, up to their limit."""
        return 1

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Channels, height and width of one stored latent, before packing: the network's native size."""
        config = self.pipeline.transformer.config
        side = native_side(config) // self.ELEMENT
        return (config.in_channels // self.PACKED, side, side)

    def schedule(self, num_steps: int, eta: float, latent_shape: Sequence[int] | None = None) -> Schedule:
        """Return the steps of the flow's SDE; ``eta`` is its noise level, and some shift them by the image's size."""
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.pipeline.scheduler.config)
        levels = self.levels(scheduler.config, num_steps, latent_shape or self.latent_shape)
        return make_flow_schedule(scheduler, num_steps, eta, levels)

    @classmethod
    def levels(cls, config: Mapping[str, Any], num_steps: int, latent_shape: Sequence[int]) -> Levels:
        """Return what the pipeline tells a scheduler with this configuration about its noise levels."""
        dynamic = config.get("use_dynamic_shifting")
        return Levels(cls.FROM_ONE, cls.shift(config, num_steps, cls.tokens(latent_shape)) if dynamic else None)

    @classmethod
    def tokens(cls, latent_shape: Sequence[int]) -> int:
        """Return the number of tokens of an image."""
        *_, height, width = latent_shape
        return (height // cls.PATCH) * (width // cls.PATCH)

    @staticmethod
    def shift(config: Mapping[str, Any], num_steps: int, tokens: int) -> float:
        """Return mu, a line through two published image sizes. Source: diffusers' ``calculate_shift``."""
        few, many = config["base_image_seq_len"], config["max_image_seq_len"]
        slope = (config["max_shift"] - config["base_shift"]) / (many - few)
        return float(config["base_shift"] + slope * (tokens - few))

    @staticmethod
    def chain(config: Mapping[str, Any], prediction_type: str | None = None, zero_snr: bool | None = None) -> Any:
        """Return the flow's Euler steps; other solvers choose other noise levels and are refused."""
        FlowFamily.refuse_unet_settings(prediction_type, zero_snr)
        return flow_chain_of(config)

    @staticmethod
    def refuse_unet_settings(prediction_type: str | None, zero_snr: bool | None) -> None:
        """Refuse what only a UNet's file may leave open."""
        if prediction_type or zero_snr is not None:
            raise D3POError("model.prediction_type and model.zero_terminal_snr are for models with a UNet; this one "
                            "predicts a flow: leave them out")  # fmt: skip

    @classmethod
    def default_eta(cls, num_steps: int, scheduler: Any, latent_shape: Sequence[int]) -> float:
        """Return the largest noise level that leaves no grain, at most Flow-GRPO's 0.7."""
        return default_noise_level(scheduler, num_steps, cls.levels(scheduler.config, num_steps, latent_shape))

    @staticmethod
    def scaled(latent_BCHW: torch.Tensor, config: Any) -> torch.Tensor:
        """Return the VAE's latents in the scale of the network; undoes ``unscaled``."""
        return (latent_BCHW - config.shift_factor) * config.scaling_factor

    @staticmethod
    def unscaled(latent_BCHW: torch.Tensor, config: Any) -> torch.Tensor:
        """Return latents in the scale that the VAE decodes."""
        return latent_BCHW / config.scaling_factor + config.shift_factor
