"""Stable Diffusion XL: two text encoders, and a UNet that also takes a pooled embedding and the image's size."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import StableDiffusionXLPipeline

from d3po_core.models.families.family import Embedding
from d3po_core.models.families.parts import NormedVae, Part, SizedUNet
from d3po_core.models.families.stable_diffusion import WIDEST_TEXT, StableDiffusion, widest_text


class StableDiffusionXL(StableDiffusion):
    """See Family."""

    PIPELINE: ClassVar[Any] = StableDiffusionXLPipeline
    TEXT_PARTS: ClassVar[tuple[str, ...]] = ("text_encoder", "text_encoder_2")
    PARTS: ClassVar[dict[str, type[Part]]] = {"unet": SizedUNet, "vae": NormedVae}
    DRAWING: ClassVar[str] = """\
pipe = diffusers.DiffusionPipeline.from_pretrained({base})
pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config{chain})"""
    LEFT_OUT: ClassVar[dict[str, Any]] = {}
    FIRST_AUTHORS_NAMES: ClassVar[bool] = True
    READS_TEXT_BY_ATTENTION_ALONE: ClassVar[bool] = False  # a pooled embedding is added to the timestep's

    @staticmethod
    def trained(shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Return whether the weights belong to a UNet that reads two text encoders."""
        return widest_text(shapes) >= WIDEST_TEXT

    def embed(self, prompt: str, device: torch.device) -> Embedding:
        """Return both encoders' states side by side ``[L, D]``, pooled state ``[P]``, and six size and crop numbers.

        The empty prompt gives zeros if the model's configuration says that it was trained so.
        """
        text_1LD, _, pooled_1P, _ = self.pipeline.encode_prompt(
            prompt, device=device, do_classifier_free_guidance=False
        )
        if prompt == "" and self.pipeline.config.force_zeros_for_empty_prompt:
            text_1LD, pooled_1P = torch.zeros_like(text_1LD), torch.zeros_like(pooled_1P)
        _, height, width = self.latent_shape
        scale = self.pipeline.vae_scale_factor
        size = (height * scale, width * scale)
        time_ids = torch.tensor([*size, 0, 0, *size], dtype=text_1LD.dtype, device=device)  # whole image, no crop
        return {"encoder_hidden_states": text_1LD[0], "text_embeds": pooled_1P[0], "time_ids": time_ids}

    def predict(
        self,
        network: torch.nn.Module,
        latent_BCHW: torch.Tensor,
        t_B: torch.Tensor,
        embeddings: Embedding,
    ) -> torch.Tensor:
        """Return the UNet's output."""
        added = {name: embeddings[name] for name in ("text_embeds", "time_ids")}
        text_BLD = embeddings["encoder_hidden_states"]
        return network(latent_BCHW, t_B, encoder_hidden_states=text_BLD, added_cond_kwargs=added).sample

    @staticmethod
    def scaled(latent_BCHW: torch.Tensor, config: Any) -> torch.Tensor:
        """Return the VAE's latents in the scale of the network; undoes ``unscaled``."""
        if config.latents_mean is None:
            return latent_BCHW * config.scaling_factor
        mean_C11, std_C11 = (
            latent_BCHW.new_tensor(v)[:, None, None] for v in (config.latents_mean, config.latents_std)
        )
        return (latent_BCHW - mean_C11) * config.scaling_factor / std_C11

    @staticmethod
    def unscaled(latent_BCHW: torch.Tensor, config: Any) -> torch.Tensor:
        """Return latents in the scale that the VAE decodes, with its mean and deviation per channel if it has any."""
        if config.latents_mean is None:
            return latent_BCHW / config.scaling_factor
        mean_C11, std_C11 = (
            latent_BCHW.new_tensor(v)[:, None, None] for v in (config.latents_mean, config.latents_std)
        )
        return latent_BCHW * std_C11 / config.scaling_factor + mean_C11
