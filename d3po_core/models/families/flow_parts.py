"""Schemas of the parts of FLUX, Qwen-Image, Z-Image and SANA; see parts.py."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from d3po_core.models.families.parts import Channels, Factor, Finite, Network, Side, Vae

EvenSide = Annotated[int, Field(strict=True, ge=2, le=4096, multiple_of=2)]
NATIVE_SIDE = 128


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
