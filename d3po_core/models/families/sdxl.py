"""Stable Diffusion XL: two text encoders, and a UNet that also takes a pooled embedding and the image's size."""

from collections.abc import Mapping
from functools import cache
from typing import Any, ClassVar

import torch
from diffusers import StableDiffusionXLPipeline

from d3po_core.models.families.family import Embedding
from d3po_core.models.families.parts import NormedVae, Part, SizedUNet
from d3po_core.models.families.stable_diffusion import WIDEST_TEXT, StableDiffusion, widest_text
from d3po_core.models.families.windows import encoded, token_windows


@cache  # a copy to a GPU would wait for its work in every pass
def _told_size(height: int, width: int, like: tuple[torch.dtype, torch.device]) -> torch.Tensor:
    """Return what the UNet is told of an image: original size, crop and target size, ``[6]``; nothing is cropped."""
    return torch.tensor([height, width, 0, 0, height, width], dtype=like[0], device=like[1])


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
        """Return both encoders' states side by side ``[L, D]`` and the pooled state ``[P]``.

        The empty prompt gives zeros if the model's configuration says that it was trained so.
        """
        text_1LD, _, pooled_1P, _ = self.pipeline.encode_prompt(
            prompt, device=device, do_classifier_free_guidance=False
        )
        if prompt == "" and self.pipeline.config.force_zeros_for_empty_prompt:
            text_1LD, pooled_1P = torch.zeros_like(text_1LD), torch.zeros_like(pooled_1P)
        return {"encoder_hidden_states": text_1LD[0], "text_embeds": pooled_1P[0]}

    def windows(self, prompt: str) -> int:
        """Return the number of windows that hold all of a prompt in both encoders."""
        return max(len(token_windows(marks, prompt)) for marks in (self.pipeline.tokenizer, self.pipeline.tokenizer_2))

    def embed_windows(self, prompt: str, windows: int, device: torch.device) -> Embedding:
        """Return both encoders' states of all windows in a row ``[L, D]``, and the first window's pooled state."""
        pipeline = self.pipeline
        both = [
            encoded(marks, encoder, prompt, windows, device)
            for marks, encoder in (
                (pipeline.tokenizer, pipeline.text_encoder), (pipeline.tokenizer_2, pipeline.text_encoder_2),
            )
        ]  # fmt: skip
        text_LD = torch.cat([torch.cat([window.hidden_states[-2][0] for window in found]) for found in both], dim=-1)
        pooled_P = both[1][0].text_embeds[0]
        if prompt == "" and pipeline.config.force_zeros_for_empty_prompt:
            text_LD, pooled_P = torch.zeros_like(text_LD), torch.zeros_like(pooled_P)
        return {"encoder_hidden_states": text_LD, "text_embeds": pooled_P}

    def predict(
        self,
        network: torch.nn.Module,
        latent_BCHW: torch.Tensor,
        t_B: torch.Tensor,
        embeddings: Embedding,
    ) -> torch.Tensor:
        """Return the UNet's output; the UNet is told the image's size."""
        text_BLD, pooled_BP = embeddings["encoder_hidden_states"], embeddings["text_embeds"]
        height, width = (side * self.pipeline.vae_scale_factor for side in latent_BCHW.shape[-2:])
        size_6 = _told_size(height, width, (pooled_BP.dtype, pooled_BP.device))
        added = {"text_embeds": pooled_BP, "time_ids": size_6.expand(len(pooled_BP), -1)}
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
