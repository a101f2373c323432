"""Stable Diffusion 1.x and 2.x: one text encoder, a UNet, DDIM steps."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from d3po_core.denoising.ddim import Schedule, make_schedule
from d3po_core.denoising.schedulers import chain_of
from d3po_core.models.families.family import Embedding
from d3po_core.models.families.parts import Part, PlainUNet, Vae

WIDEST_TEXT = 2048  # how wide the states are that XL's UNet reads: those of two text encoders


def widest_text(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """How wide the text is that a UNet's cross-attention reads, by its trained weights; 0 when it is no UNet's."""
    return max((shape[-1] for name, shape in shapes.items() if "attn2.to_k" in name), default=0)


class StableDiffusion:
    """See Family; also what models of other sizes with a UNet share."""

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

    TEXT_STATES: ClassVar[str] = "encoder_hidden_states"
    READS_TEXT_BY_ATTENTION_ALONE: ClassVar[bool] = True

    DRAWING: ClassVar[str] = """\
pipe = diffusers.DiffusionPipeline.from_pretrained({base}, safety_checker=None)
pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config{chain})"""
    STEP_NOISE: ClassVar[bool] = True
    FIRST_AUTHORS_NAMES: ClassVar[bool] = False

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one latent: the size that the UNet was trained with."""
        config = self.pipeline.unet.config
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return (config.in_channels, height, width)

    @staticmethod
    def trained(shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether the weights are of a UNet that reads one text encoder."""
        return 0 < widest_text(shapes) < WIDEST_TEXT

    def schedule(self, num_steps: int, eta: float) -> Schedule:
        """DDIM steps over the noise schedule that the model was trained with."""
        return make_schedule(DDIMScheduler.from_config(self.pipeline.scheduler.config), num_steps, eta)

    @staticmethod
    def chain(config: Mapping[str, Any], prediction_type: str | None = None, zero_snr: bool | None = None) -> Any:
        """The scheduler whose steps are trained, out of what the model's own one says."""
        return chain_of(config, prediction_type, zero_snr)

    @staticmethod
    def default_eta(num_steps: int, scheduler: Any) -> float:
        """DDIM's full noise, which its last steps take away again."""
        return 1.0

    def embed(self, prompt: str, device: torch.device) -> Embedding:
        """The text encoder's states ``[L, D]``."""
        text_1LD, _ = self.pipeline.encode_prompt(prompt, device, 1, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": text_1LD[0]}

    def predict(
        self,
        network: torch.nn.Module,
        latent_BCHW: torch.Tensor,
        t_B: torch.Tensor,
        embeddings: Embedding,
    ) -> torch.Tensor:
        """The UNet's output."""
        return network(latent_BCHW, t_B, **embeddings).sample

    def decode(self, latent_BCHW: torch.Tensor) -> torch.Tensor:
        """The VAE's images."""
        vae = self.pipeline.vae
        return vae.decode(self.unscaled(latent_BCHW, vae.config).to(vae.dtype)).sample

    @staticmethod
    def unscaled(latent_BCHW: torch.Tensor, config: Any) -> torch.Tensor:
        """Latents as the VAE decodes them, by what its configuration says and the family's pipeline reads of it."""
        return latent_BCHW / config.scaling_factor
