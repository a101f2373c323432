"""Stable Diffusion 1.x and 2.x: one text encoder, a UNet, DDIM steps."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from d3po_core.denoising.ddim import Schedule, make_schedule
from d3po_core.denoising.schedulers import chain_of
from d3po_core.models.families.family import Embedding, Guidance
from d3po_core.models.families.parts import Part, PlainUNet, Vae
from d3po_core.models.families.windows import encoded, token_windows
from d3po_core.sizes import Grid

WIDEST_TEXT = 2048  # XL's UNet reads states of this width, from two text encoders


def widest_text(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return the text width of a UNet's cross-attention, from its trained weights; 0 if they are not a UNet's."""
    texts = (shape[-1] for name, shape in shapes.items() if "attentions." in name and "attn2.to_k" in name)
    return max(texts, default=0)


class StableDiffusion:
    """See Family; also the base class of the other families."""

    PIPELINE: ClassVar[Any] = StableDiffusionPipeline
    NETWORK: ClassVar[str] = "unet"
    TEXT_PARTS: ClassVar[tuple[str, ...]] = ("text_encoder",)
    OPTIONAL_PARTS: ClassVar[tuple[str, ...]] = ()
    LEFT_OUT: ClassVar[dict[str, Any]] = {
        "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False,
    }  # fmt: skip
    PARTS: ClassVar[dict[str, type[Part]]] = {"unet": PlainUNet, "vae": Vae}
    REGIONS: ClassVar[tuple[str, ...]] = (
        "CrossAttnDownBlock2D", "DownBlock2D", "UNetMidBlock2DCrossAttn", "CrossAttnUpBlock2D", "UpBlock2D",
    )  # fmt: skip

    PRECISIONS: ClassVar[tuple[str, ...]] = ("no", "fp16", "bf16")
    LORA_TARGETS: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    TEXT_WINDOWS: ClassVar[Mapping[str, int]] = {}
    PATCH: ClassVar[int] = 1
    """Width of the smallest piece that the network takes, in elements of a stored latent."""
    ELEMENT: ClassVar[int] = 1
    """Width of an element of a stored latent, in elements of the VAE's."""
    TEXT_STATES: ClassVar[str] = "encoder_hidden_states"
    READS_TEXT_BY_ATTENTION_ALONE: ClassVar[bool] = True

    DRAWING: ClassVar[str] = """\
pipe = diffusers.DiffusionPipeline.from_pretrained({base}, safety_checker=None)
pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config{chain})"""
    COMFYUI: ClassVar[bool] = False
    FIRST_AUTHORS_NAMES: ClassVar[bool] = False

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline

    @property
    def guidance(self) -> Guidance:
        """Classifier-free guidance, by a second pass for the empty prompt."""
        return "two passes"

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Channels, height and width of one latent: the size that the UNet was trained with."""
        config = self.pipeline.unet.config
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return (config.in_channels, height, width)

    @classmethod
    def call(cls, guidance: float, eta: float, network: Part | None) -> str:
        """Return guidance and step noise under the pipeline's names."""
        return f"guidance_scale={guidance},\n    eta={eta},"

    @classmethod
    def call_away(cls, negative_prompt: str) -> str:
        """Return the negative prompt under the pipeline's name; empty if there is none."""
        return f"negative_prompt={json.dumps(negative_prompt)}," if negative_prompt else ""

    @classmethod
    def call_size(cls, height: int, width: int) -> str:
        """Return the size under the pipeline's names."""
        return f"height={height}, width={width},"

    @property
    def grid(self) -> Grid:
        """Multiples of the smallest piece that the network takes."""
        return Grid(self.PIPELINE.__name__, self.pipeline.vae_scale_factor * self.ELEMENT * self.PATCH)

    def latent_shape_at(self, height: int, width: int) -> tuple[int, ...]:
        """Return the shape of one stored latent of an image of this many pixels."""
        self.grid.check((height, width), "an image")
        pixels = self.pipeline.vae_scale_factor * self.ELEMENT
        return (self.latent_shape[0], height // pixels, width // pixels)

    @staticmethod
    def trained(shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Return whether the weights belong to a UNet that reads one text encoder."""
        return 0 < widest_text(shapes) < WIDEST_TEXT

    def schedule(self, num_steps: int, eta: float, latent_shape: Sequence[int] | None = None) -> Schedule:
        """Return DDIM steps over the noise schedule that the model was trained with, the same for every size."""
        return make_schedule(DDIMScheduler.from_config(self.pipeline.scheduler.config), num_steps, eta)

    @staticmethod
    def chain(config: Mapping[str, Any], prediction_type: str | None = None, zero_snr: bool | None = None) -> Any:
        """Build the scheduler whose steps are trained from the model's own configuration."""
        return chain_of(config, prediction_type, zero_snr)

    @classmethod
    def default_eta(cls, num_steps: int, scheduler: Any, latent_shape: Sequence[int]) -> float:
        """Return DDIM's full noise, which its last steps remove again."""
        return 1.0

    def embed(self, prompt: str, device: torch.device) -> Embedding:
        """Return the text encoder's states ``[L, D]``."""
        text_1LD, _ = self.pipeline.encode_prompt(prompt, device, 1, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": text_1LD[0]}

    def embed_negative(self, prompt: str, device: torch.device) -> Embedding:
        """Return the negative prompt's embedding, made as any prompt's."""
        return self.embed(prompt, device)

    def windows(self, prompt: str) -> int:
        """Return the number of windows that hold all of a prompt."""
        return len(token_windows(self.pipeline.tokenizer, prompt))

    def embed_windows(self, prompt: str, windows: int, device: torch.device) -> Embedding:
        """Return the text encoder's states of all windows in a row ``[L, D]``."""
        pipeline = self.pipeline
        found = encoded(pipeline.tokenizer, pipeline.text_encoder, prompt, windows, device)
        return {"encoder_hidden_states": torch.cat([window.last_hidden_state[0] for window in found])}

    @staticmethod
    def stack(embeddings: Sequence[Embedding]) -> Embedding:
        """Return embeddings with a batch dimension; all have one length."""
        return {name: torch.stack([embedding[name] for embedding in embeddings]) for name in embeddings[0]}

    @staticmethod
    def guide(without_BCHW: torch.Tensor, with_BCHW: torch.Tensor, scale: float) -> torch.Tensor:
        """Return the prediction led away from that of the negative prompt. Source: arXiv 2207.12598."""
        return without_BCHW + scale * (with_BCHW - without_BCHW)

    def predict(
        self,
        network: torch.nn.Module,
        latent_BCHW: torch.Tensor,
        t_B: torch.Tensor,
        embeddings: Embedding,
    ) -> torch.Tensor:
        """Return the UNet's output."""
        return network(latent_BCHW, t_B, **embeddings).sample

    def decode(self, latent_BCHW: torch.Tensor) -> torch.Tensor:
        """Return the VAE's images."""
        vae = self.pipeline.vae
        return vae.decode(self.unscaled(latent_BCHW, vae.config).to(vae.dtype)).sample

    def encode(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        """Return the mean of the VAE's posterior, in the scale of the network."""
        vae = self.pipeline.vae
        mean_BCHW = vae.encode(image_BCHW.to(vae.dtype)).latent_dist.mode()
        return self.scaled(mean_BCHW.float(), vae.config)

    @staticmethod
    def scaled(latent_BCHW: torch.Tensor, config: Any) -> torch.Tensor:
        """Return the VAE's latents in the scale of the network; undoes ``unscaled``."""
        return latent_BCHW * config.scaling_factor

    @staticmethod
    def unscaled(latent_BCHW: torch.Tensor, config: Any) -> torch.Tensor:
        """Return latents in the scale that the VAE decodes, from the configuration fields that the pipeline reads."""
        return latent_BCHW / config.scaling_factor
