"""A LoRA beside a frozen network; with the LoRA off, or as it was at the start, the network is the base model."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError

from d3po_core.config import ModelConfig
from d3po_core.errors import D3POError
from d3po_core.models.families import Family
from d3po_core.models.start import continued, read_start
from d3po_core.models.weights import LORA_FILE, sort_metadata


class Lora:
    """See Trained."""

    def __init__(self, network: Any, family: Family, config: ModelConfig, seed: int) -> None:
        self._network, self._family, self._config = network, family, config
        start = read_start(config, family) if config.start_from and config.start_as == "continue" else None
        lora = LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha or config.lora_rank,
            target_modules=list(config.lora_targets),
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                network.add_adapter(lora)
            except ValueError as error:
                raise D3POError(f"model.lora_targets {list(config.lora_targets)}: {error}") from None
        for _, parameter in self.parameters():
            parameter.data = parameter.data.float()
        self._initial = {k: v.clone() for k, v in get_peft_model_state_dict(network).items()}
        self._start: dict[str, torch.Tensor] = {}
        if start is not None:
            self._initial = continued(config, family, start, self._initial)
            self.reset()
            self._start = {name: weight.detach().clone() for name, weight in self.parameters()}

    def parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """Return names and values of the LoRA's weights, in a fixed order."""
        return sorted((n, p) for n, p in self._network.named_parameters() if p.requires_grad)

    def changed(self) -> None:
        """Do nothing: passes use a LoRA's weights directly."""

    @contextlib.contextmanager
    def base(self) -> Iterator[None]:
        """Switch the LoRA off within this context, at no memory cost; a continued one is as it was at the start."""
        if not self._start:
            with self._off():
                yield
            return
        trained = [(weight, weight.data) for _, weight in self.parameters()]
        try:
            for name, weight in self.parameters():
                weight.data = self._start[name].to(weight.device)
            yield
        finally:
            for weight, data in trained:
                weight.data = data

    @contextlib.contextmanager
    def _off(self) -> Iterator[None]:
        self._network.disable_adapters()
        try:
            yield
        finally:
            self._network.enable_adapters()

    @contextlib.contextmanager
    def merged(self) -> Iterator[None]:
        """Merge the LoRA into the base weights within this context.

        Afterwards the original base weights are restored; subtracting the LoRA would let them drift.
        """
        layers = [m for m in self._network.modules() if isinstance(m, LoraLayer)]
        originals = [layer.get_base_layer().weight.data for layer in layers]
        try:
            for layer, original in zip(layers, originals, strict=True):
                layer.get_base_layer().weight.data = original + layer.get_delta_weight("default")
            with self._off():
                yield
        finally:
            for layer, original in zip(layers, originals, strict=True):
                layer.get_base_layer().weight.data = original

    def reset(self) -> None:
        """Reset the LoRA to its seeded start, where it changes nothing."""
        set_peft_model_state_dict(self._network, self._initial)

    def save(self, folder: Path) -> Path:
        """Write the LoRA as the file that ``pipe.load_lora_weights(folder)`` reads; return its path."""
        part = self._family.NETWORK
        state = {k: v.contiguous().cpu() for k, v in get_peft_model_state_dict(self._network).items()}
        metadata = {"r": self._config.lora_rank, "lora_alpha": self._config.lora_alpha or self._config.lora_rank,
                    "target_modules": sorted(self._config.lora_targets)}  # fmt: skip
        layers = {f"{part}_lora_layers": state, f"{part}_lora_adapter_metadata": metadata}
        self._family.PIPELINE.save_lora_weights(folder, weight_name=LORA_FILE, **layers)
        sort_metadata(folder / LORA_FILE)
        return folder / LORA_FILE

    def load(self, folder: Path) -> None:
        """Load the LoRA from a checkpoint folder.

        Raises:
            D3POError: the file is missing or damaged, or its rank or layers differ.
        """
        try:
            found = self._family.PIPELINE.lora_state_dict(folder, weight_name=LORA_FILE, local_files_only=True)
        except (OSError, SafetensorError) as error:
            raise D3POError(
                f"checkpoint {folder}: cannot be read ({error}); restore it or start a new campaign"
            ) from None
        state = found[0] if isinstance(found, tuple) else found
        state = {name.removeprefix(f"{self._family.NETWORK}."): value for name, value in state.items()}
        own = self._initial
        if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in own.items()}:
            raise D3POError(
                f"checkpoint {folder}: its LoRA has other layers or another rank than model.lora_* asks for"
            )
        set_peft_model_state_dict(self._network, state)
