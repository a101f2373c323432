"""Read scorers' models, from transformers' own weight layout or the authors' renamed."""

from typing import Any

import torch
from safetensors import safe_open

from d3po_core.scorers.sources import WEIGHTS, Source

State = dict[str, torch.Tensor]


def read_model(kind: Any, source: Source, config: Any, state: State | None = None, place: str | None = None) -> Any:
    """Load a model in single precision on the CPU, for inference; all its weights must come from the file.

    Args:
        kind: transformers' class.
        source: where the weights are.
        config: its configuration.
        state: weights under transformers' names, if already read, for example to rename them.
        place: folder or hub id with the weights; ``source.where`` by default.

    Raises:
        D3POError: weights are missing, or do not fit the configuration.
    """
    options = {"config": config, "dtype": torch.float32, "output_loading_info": True,
               "ignore_mismatched_sizes": True}  # fmt: skip
    if state is not None:
        model, found = kind.from_pretrained(None, state_dict=state, **options)
    else:
        model, found = kind.from_pretrained(place or source.where, use_safetensors=True, **options)
    # The library draws missing weights at random with only a warning, and the scores would look normal.
    wrong = sorted({*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])})
    if wrong:
        raise source.error(
            f"{len(wrong)} weights are missing or of another size, such as {wrong[0]}; expected those that config.json "
            "describes (docs/scorers.md)"
        )
    return model.eval().requires_grad_(False)


def names_in(source: Source) -> set[str]:
    """Return the weights' names in their file; empty for several files, which only transformers writes."""
    path = source.weights()
    if path.name != WEIGHTS:
        return set()
    with safe_open(path, framework="pt") as file:
        return set(file.keys())


class Head(torch.nn.Module):
    """A stack of linear layers, ``[B, width] -> [B]``, as the authors of both heads publish them.

    Only dropout lies between the layers, and it is off. The names are ``layers.<n>.weight`` and ``.bias``.
    """

    def __init__(self, source: Source, state: State, width: int) -> None:
        super().__init__()
        numbers = sorted(int(name.split(".")[1]) for name in state if name.endswith(".weight"))
        if not numbers or any(f"layers.{n}.bias" not in state for n in numbers):
            raise source.error("has no head: weights named layers.0.weight, layers.0.bias and so on (docs/scorers.md)")
        layers = [(state[f"layers.{n}.weight"], state[f"layers.{n}.bias"]) for n in numbers]
        widths = [width, *(len(bias) for _, bias in layers)]
        if [weight.shape[1] for weight, _ in layers] != widths[:-1] or widths[-1] != 1:
            raise source.error(
                f"its head takes {layers[0][0].shape[1]} numbers and gives {widths[-1]}; expected {width} and 1"
            )
        self.layers = torch.nn.Sequential(*(_linear(weight, bias) for weight, bias in layers))

    def forward(self, features_BF: torch.Tensor) -> torch.Tensor:
        """Return one number per row ``[B]``, in single precision."""
        return self.layers(features_BF.float()).squeeze(1)


def _linear(weight: torch.Tensor, bias: torch.Tensor) -> torch.nn.Linear:
    outputs, inputs = weight.shape
    layer = torch.nn.Linear(inputs, outputs).requires_grad_(False)
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)
    return layer


def head_state(state: State, prefix: str = "") -> State:
    """Select a head's tensors by prefix, and strip the prefix from their names."""
    start = f"{prefix}layers."
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(start)}
