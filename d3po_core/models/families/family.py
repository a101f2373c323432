"""The interface between the policy and a model."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Protocol

import torch

from d3po_core.denoising.ddim import Schedule
from d3po_core.models.families.parts import Part
from d3po_core.sizes import Grid

# A prompt's embedding: named tensors, with a batch dimension only once stacked.
Embedding = dict[str, torch.Tensor]
# How a network is guided: by a second pass for the empty prompt, by a number that it is told, or not at all.
Guidance = Literal["two passes", "told", "none"]


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
    """Classes of the network's blocks that are compiled one by one; empty if that was not verified."""
    PRECISIONS: ClassVar[tuple[str, ...]]
    """The values of ``model.precision`` in which its numbers stay finite."""
    LORA_TARGETS: ClassVar[tuple[str, ...]]
    """Layers that get a LoRA unless ``model.lora_targets`` says otherwise."""
    TEXT_WINDOWS: ClassVar[Mapping[str, int]]
    """By tokenizer, the tokens of a prompt that the pipeline reads; by default as many as the tokenizer says."""

    ELEMENT: ClassVar[int]
    """Width of an element of a stored latent, in elements of the VAE's."""
    TEXT_STATES: ClassVar[str]
    """The entry of an embedding that the network's cross-attention reads."""
    READS_TEXT_BY_ATTENTION_ALONE: ClassVar[bool]
    """Whether images with other texts are computed alike until the first cross-attention."""

    DRAWING: ClassVar[str]
    """Lines of Python, for a model card, that load ``{base}`` as ``pipe`` with the steps it was trained with.

    ``{chain}`` stands for what the model's own scheduler does not say of them.
    """
    COMFYUI: ClassVar[bool]
    """Whether ComfyUI reads the network's LoRA under diffusers' names."""
    FIRST_AUTHORS_NAMES: ClassVar[bool]
    """Whether other programs know the network's blocks by the first authors' names alone (kohya.py)."""

    pipeline: Any
    """The loaded pipeline."""

    def __init__(self, pipeline: Any) -> None: ...

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of one stored latent: channels first, then as many dimensions as the family has."""
        ...

    @property
    def grid(self) -> Grid:
        """The sizes that the loaded network draws."""
        ...

    def latent_shape_at(self, height: int, width: int) -> tuple[int, ...]:
        """Return the shape of one stored latent of an image of this many pixels.

        Raises:
            D3POError: the size is off the family's grid.
        """
        ...

    @property
    def guidance(self) -> Guidance:
        """How the loaded network is guided."""
        ...

    @classmethod
    def call(cls, guidance: float, eta: float, network: Part | None) -> str:
        """Return arguments of the pipeline's call for a model card; ``network`` is None if its file is not here."""
        ...

    @classmethod
    def call_away(cls, negative_prompt: str) -> str:
        """Return the argument of the pipeline's call for a negative prompt; empty if none is needed."""
        ...

    @classmethod
    def call_size(cls, height: int, width: int) -> str:
        """Return arguments of the pipeline's call for a size in pixels."""
        ...

    @staticmethod
    def trained(shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Return whether trained weights with these names and shapes belong to this family."""
        ...

    def schedule(self, num_steps: int, eta: float, latent_shape: Sequence[int] | None = None) -> Schedule:
        """Return the model's denoising steps for latents of a shape, the network's native one by default."""
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

    @classmethod
    def default_eta(cls, num_steps: int, scheduler: Any, latent_shape: Sequence[int]) -> float:
        """Return the default step noise; ``scheduler`` comes from ``chain``."""
        ...

    def embed(self, prompt: str, device: torch.device) -> Embedding:
        """Embed one prompt."""
        ...

    def embed_negative(self, prompt: str, device: torch.device) -> Embedding:
        """Embed the prompt that guidance leads away from, by default the empty one."""
        ...

    def windows(self, prompt: str) -> int:
        """Return the number of windows that hold all of a prompt; 1 for families that do not read by windows."""
        ...

    def embed_windows(self, prompt: str, windows: int, device: torch.device) -> Embedding:
        """Embed one prompt window by window; empty windows fill up the number. For CLIP's families only."""
        ...

    @staticmethod
    def stack(embeddings: Sequence[Embedding]) -> Embedding:
        """Return embeddings with a batch dimension; those of unequal length are padded."""
        ...

    @staticmethod
    def guide(without_BCHW: torch.Tensor, with_BCHW: torch.Tensor, scale: float) -> torch.Tensor:
        """Return the prediction led away from that of the negative prompt; ``scale`` 1 is the prompt's own."""
        ...

    def predict(
        self, network: torch.nn.Module, latent_BCHW: torch.Tensor, t_B: torch.Tensor, embeddings: Embedding
    ) -> torch.Tensor:
        """Return the network's output for stacked embeddings; a told guidance is among them, as ``guidance``."""
        ...

    def decode(self, latent_BCHW: torch.Tensor) -> torch.Tensor:
        """Decode final latents to images ``[B, 3, height, width]``, nominally in [-1, 1]."""
        ...

    def encode(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        """Return the latents that decode to images in [-1, 1]: the mean of the VAE's posterior."""
        ...
