"""The interface between the policy and a model."""

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import torch

from d3po_core.denoising.ddim import Schedule
from d3po_core.models.families.parts import Part

# A prompt's embedding: named tensors, with a batch dimension only once stacked.
Embedding = dict[str, torch.Tensor]


class Family(Protocol):
    """The interface between the policy and a model."""

    PIPELINE: ClassVar[Any]
    """The diffusers pipeline that such a folder holds."""
    NETWORK: ClassVar[str]
    """Name of the part that is trained."""
    TEXT_PARTS: ClassVar[tuple[str, ...]]
    """Names of the parts that ``embed`` needs."""
    OPTIONAL_PARTS: ClassVar[tuple[str, ...]]
    """Those of them that a folder may leave out."""
    LEFT_OUT: ClassVar[dict[str, Any]]
    """Options of the pipeline for parts that are not wanted: loading them, or missing them, would be for nothing."""
    PARTS: ClassVar[dict[str, type[Part]]]
    """What the configurations of the network and of the VAE may say."""
    REGIONS: ClassVar[tuple[str, ...]]
    """Classes of the network's blocks that are compiled one by one."""

    TEXT_STATES: ClassVar[str]
    """The entry of an embedding that the network's cross-attention reads."""
    READS_TEXT_BY_ATTENTION_ALONE: ClassVar[bool]
    """Whether images with other texts are computed alike until the first cross-attention."""

    DRAWING: ClassVar[str]
    """Lines of Python, for a model card, that load ``{base}`` as ``pipe`` with the steps it was trained with.

    ``{chain}`` stands for what the model's own scheduler does not say of them.
    """
    STEP_NOISE: ClassVar[bool]
    """Whether the pipeline takes the steps' noise as ``eta``."""
    FIRST_AUTHORS_NAMES: ClassVar[bool]
    """Whether other programs know the network's blocks by the first authors' names alone (kohya.py)."""

    pipeline: Any
    """The loaded pipeline."""

    def __init__(self, pipeline: Any) -> None: ...

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of one latent."""
        ...

    @staticmethod
    def trained(shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Return whether trained weights with these names and shapes belong to this family."""
        ...

    def schedule(self, num_steps: int, eta: float) -> Schedule:
        """Return the model's denoising steps."""
        ...

    @staticmethod
    def chain(config: Mapping[str, Any], prediction_type: str | None = None, zero_snr: bool | None = None) -> Any:
        """Build the scheduler whose steps are trained from the model's own configuration.

        Args:
            config: the model's scheduler configuration.
            prediction_type: the network's prediction type; overrides ``config``.
            zero_snr: whether the last timestep is pure noise; overrides ``config``.

        Raises:
            D3POError: the scheduler asks for steps that this chain does not have.
        """
        ...

    @staticmethod
    def default_eta(num_steps: int, scheduler: Any) -> float:
        """Return the default step noise; ``scheduler`` comes from ``chain``."""
        ...

    def embed(self, prompt: str, device: torch.device) -> Embedding:
        """Embed one prompt; guidance leads away from the empty prompt's embedding."""
        ...

    def predict(
        self, network: torch.nn.Module, latent_BCHW: torch.Tensor, t_B: torch.Tensor, embeddings: Embedding
    ) -> torch.Tensor:
        """Return the network's output for stacked embeddings."""
        ...

    def decode(self, latent_BCHW: torch.Tensor) -> torch.Tensor:
        """Decode final latents to images ``[B, 3, height, width]``, nominally in [-1, 1]."""
        ...
