"""Schemas of a pipeline's part files: every field that the pipeline reads is honoured or refused here.

Defaults for missing fields are diffusers' own.
"""

from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Channels = Annotated[int, Field(strict=True, ge=1, le=4096)]
Side = Annotated[int, Field(strict=True, ge=1, le=4096)]
Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Factor = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]


class Part(BaseModel):
    """The configuration of one pipeline part; fields that no pipeline reads are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    WHY: ClassVar[dict[str, str]] = {}
    """What a field that must be absent would ask for."""


class Network(Part):
    """A trained network."""

    in_channels: Channels
    out_channels: Channels | None

    @property
    def predicted_channels(self) -> int | None:
        """Return the channels of a prediction, counted as in ``in_channels``."""
        return self.out_channels

    @model_validator(mode="after")
    def _predicts_what_it_gets(self) -> Self:
        if self.in_channels != self.predicted_channels:
            raise ValueError(
                f"in_channels is {self.in_channels} and out_channels {self.out_channels}; expected the same number: "
                "inpainting networks and those that predict a variance are not supported"
            )
        return self

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one stored latent: the size that the network was trained with."""
        raise NotImplementedError


class UNet(Network):
    """A UNet conditioned on a timestep and a text."""

    WHY: ClassVar[dict[str, str]] = {
        "time_cond_proj_dim": "the network wants to be told its guidance, as distilled (LCM) models do",
        "class_embed_type": "the network wants to be told a class",
        "num_class_embeds": "the network wants to be told a class",
        "encoder_hid_dim": "the network wants an image or another text encoder",
        "encoder_hid_dim_type": "the network wants an image or another text encoder",
        "addition_embed_type": "the network wants to be told more than a text",
    }

    sample_size: Side | tuple[Side, Side]
    in_channels: Channels = 4
    out_channels: Channels = 4
    time_cond_proj_dim: None = None
    class_embed_type: None = None
    num_class_embeds: None = None
    encoder_hid_dim: None = None
    encoder_hid_dim_type: None = None
    addition_embed_type: Any = None

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Channels, height and width of one latent."""
        height, width = (self.sample_size,) * 2 if isinstance(self.sample_size, int) else self.sample_size
        return (self.in_channels, height, width)


class PlainUNet(UNet):
    """The UNet of Stable Diffusion 1.x and 2.x."""

    addition_embed_type: None = None


class SizedUNet(UNet):
    """The UNet of Stable Diffusion XL, also conditioned on a pooled embedding, the image's size and its crop."""

    addition_embed_type: str = Field(pattern="^text_time$")
    addition_time_embed_dim: Channels
    projection_class_embeddings_input_dim: Channels


class Transformer(Network):
    """The transformer of Stable Diffusion 3."""

    sample_size: Side = 128
    in_channels: Channels = 16
    out_channels: Channels = 16
    patch_size: Channels = 2

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Channels, height and width of one latent."""
        return (self.in_channels, self.sample_size, self.sample_size)


class Vae(Part):
    """The decoder of latents, with its pipeline's preprocessing of a latent."""

    latent_channels: Channels = 4
    block_out_channels: tuple[Channels, ...] = Field((64,), min_length=1, max_length=16)
    scaling_factor: Factor = 0.18215
    force_upcast: bool = True

    @property
    def pixels_per_latent(self) -> int:
        """Return the height and width in pixels of one latent element."""
        return 2 ** (len(self.block_out_channels) - 1)


class NormedVae(Vae):
    """The VAE of Stable Diffusion XL, whose latents may have a mean and standard deviation per channel."""

    latents_mean: tuple[Finite, ...] | None = None
    latents_std: tuple[Factor, ...] | None = None

    @model_validator(mode="after")
    def _one_number_per_channel(self) -> Self:
        for name, other in (("latents_mean", "latents_std"), ("latents_std", "latents_mean")):
            numbers = getattr(self, name)
            if numbers is not None and len(numbers) != self.latent_channels:
                raise ValueError(f"{name} has {len(numbers)} numbers; expected latent_channels, {self.latent_channels}")
            if numbers is not None and getattr(self, other) is None:
                raise ValueError(f"{name} is there and {other} is not; expected both or neither")
        return self


class ShiftedVae(Vae):
    """The VAE of Stable Diffusion 3, which scales and shifts latents."""

    shift_factor: Finite
