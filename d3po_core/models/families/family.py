"""What the policy asks of a model."""

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import torch

from d3po_core.denoising.ddim import Schedule
from d3po_core.models.families.parts import Part

# What a prompt became: named tensors without a batch dimension. Stacked over a batch, they have one.
Embedding = dict[str, torch.Tensor]


class Family(Protocol):
    """What the policy asks of a model."""

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
        """Whether trained weights with these names and shapes are of such a network."""
        ...

    def schedule(self, num_steps: int, eta: float) -> Schedule:
        """The model's denoising steps."""
        ...

    @staticmethod
    def chain(config: Mapping[str, Any], prediction_type: str | None = None, zero_snr: bool | None = None) -> Any:
        """The scheduler whose steps are trained, out of what the model's own one says.

        Args:
            config: that of the model's scheduler.
            prediction_type: what the network predicts, when it is known better.
            zero_snr: whether its last timestep is pure noise, likewise.

        Raises:
            D3POError: it asks for steps that have no such chain.
        """
        ...

    @staticmethod
    def default_eta(num_steps: int, scheduler: Any) -> float:
        """The noise of the steps when the user does not say; ``scheduler`` is what ``chain`` made."""
        ...

    def embed(self, prompt: str, device: torch.device) -> Embedding:
        """What the network is told of one prompt; the empty prompt is what guidance leads away from."""
        ...

    def predict(
        self, network: torch.nn.Module, latent_BCHW: torch.Tensor, t_B: torch.Tensor, embeddings: Embedding
    ) -> torch.Tensor:
        """The network's output for stacked embeddings."""
        ...

    def decode(self, latent_BCHW: torch.Tensor) -> torch.Tensor:
        """Images of final latents, ``[B, 3, height, width]``, nominally in [-1, 1]."""
        ...
