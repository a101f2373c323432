"""Schemas of a pipeline's part files: every field that the pipeline reads is honoured or refused here.

Defaults for missing fields are diffusers' own.
"""

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Channels = Annotated[int, Field(strict=True, ge=1, le=4096)]
Side = Annotated[int, Field(strict=True, ge=1, le=4096)]
Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]
EvenSide = Annotated[int, Field(strict=True, ge=2, le=4096, multiple_of=2)]
NATIVE_SIDE = 128
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


def native_side(config: Any) -> int:
    """Return the side of the latents that a transformer draws if nothing asks for others.

    Transformers without places of their own do not say; their pipelines then draw 1,024 pixels.
    """
    return int(config.get("sample_size") or NATIVE_SIDE)


class PackedTransformer(Network):
    """A transformer that reads patches of 2 x 2 latent elements as tokens: FLUX.1."""

    sample_size: EvenSide = NATIVE_SIDE
    in_channels: Annotated[int, Field(strict=True, ge=4, le=4096, multiple_of=4)] = 64
    out_channels: Channels | None = None
    guidance_embeds: bool = False

    @property
    def predicted_channels(self) -> int | None:
        """Return the channels of a prediction; those of the input if the file names none."""
        return self.out_channels or self.in_channels

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Channels, height and width of one latent before packing."""
        return (self.in_channels // 4, self.sample_size, self.sample_size)


class PatchTransformer(Network):
    """The transformer of Z-Image, which cuts latents into patches of 2 x 2 itself."""

    WHY: ClassVar[dict[str, str]] = {"siglip_feat_dim": "the network wants an image"}

    sample_size: EvenSide = NATIVE_SIDE
    in_channels: Channels = 16
    out_channels: Channels | None = None
    all_patch_size: tuple[Literal[2]] = (2,)
    all_f_patch_size: tuple[Literal[1]] = (1,)
    siglip_feat_dim: None = None

    @property
    def predicted_channels(self) -> int | None:
        """Return the channels of a prediction, which are those of its input."""
        return self.in_channels

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Channels, height and width of one latent."""
        return (self.in_channels, self.sample_size, self.sample_size)


class QwenTransformer(PackedTransformer):
    """The transformer of Qwen-Image; its file counts the channels of a prediction per latent element."""

    WHY: ClassVar[dict[str, str]] = {
        "use_additional_t_cond": "the network wants to be told more than a text",
        "use_layer3d_rope": "the network draws layers",
        "zero_cond_t": "the network wants an image to edit",
    }

    out_channels: Channels | None = 16
    guidance_embeds: Literal[False] = False
    use_additional_t_cond: Literal[False] = False
    use_layer3d_rope: Literal[False] = False
    zero_cond_t: Literal[False] = False

    @property
    def predicted_channels(self) -> int | None:
        """Return the channels of a prediction."""
        return 4 * self.out_channels if self.out_channels else self.in_channels


class SanaTransformer(Network):
    """The transformer of SANA 1.5."""

    WHY: ClassVar[dict[str, str]] = {
        "guidance_embeds": "the network wants to be told its guidance, as SANA Sprint does",
    }

    sample_size: Side = 32
    in_channels: Channels = 32
    out_channels: Channels | None = 32
    patch_size: Literal[1] = 1
    guidance_embeds: Literal[False] = False

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Channels, height and width of one latent."""
        return (self.in_channels, self.sample_size, self.sample_size)


class Flux2Transformer(PackedTransformer):
    """The transformer of FLUX.2 klein, whose latents are stored as patches."""

    WHY: ClassVar[dict[str, str]] = {
        "guidance_embeds": "the network wants to be told its guidance, as FLUX.2 dev does",
    }

    in_channels: Annotated[int, Field(strict=True, ge=4, le=4096, multiple_of=4)] = 128
    guidance_embeds: Literal[False]

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Channels, height and width of one latent as patches."""
        return (self.in_channels, self.sample_size // 2, self.sample_size // 2)


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


class QwenVae(Vae):
    """The VAE of Qwen-Image, made for video; latents have a mean and a deviation per channel."""

    z_dim: Channels = 16
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    latents_mean: tuple[Finite, ...] | None = None
    latents_std: tuple[Factor, ...] | None = None

    @property
    def pixels_per_latent(self) -> int:
        """Return the height and width in pixels of one latent element."""
        return int(2 ** len(self.temperal_downsample))


class DeepVae(Vae):
    """The VAE of SANA."""

    scaling_factor: Factor = 1.0
    encoder_block_out_channels: tuple[Channels, ...] = Field((128, 256, 512, 512, 1024, 1024), min_length=1)

    @property
    def pixels_per_latent(self) -> int:
        """Return the height and width in pixels of one latent element."""
        return int(2 ** (len(self.encoder_block_out_channels) - 1))


class Flux2Vae(Vae):
    """The VAE of FLUX.2; a stored latent element is a patch of 2 x 2 of its own."""

    block_out_channels: tuple[Channels, ...] = Field((128, 256, 512, 512), min_length=1, max_length=16)
    batch_norm_eps: Factor = 1e-4

    @property
    def pixels_per_latent(self) -> int:
        """Return the height and width in pixels of one stored element."""
        return int(2 ** len(self.block_out_channels))
