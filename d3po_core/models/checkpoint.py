"""Checkpoints: trained weights and optimizer state in a folder that is written atomically."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from d3po_core.errors import D3POError
from d3po_core.models.policy import Policy
from d3po_core.models.weights import weights_file, weights_sha256
from d3po_core.store.files import as_readable_as_usual, disk_errors
from d3po_core.store.integrity import sha256_of
from d3po_core.store.stages import checkpoint_path

OPTIMIZER_FILE = "optimizer.safetensors"
RECORD_FILE = "checkpoint.json"


def save_checkpoint(folder: Path, policy: Policy, optimizer: torch.optim.Optimizer, record: dict[str, Any]) -> None:
    """Write trained weights, optimizer state and a JSON record; ``folder`` appears when all is on disk.

    Raises:
        D3POError: the disk is full or read-only; nothing is left behind.
    """
    with whole_folder(folder) as temporary:
        policy.weights.save(temporary)
        save_file(optimizer_state(policy, optimizer), temporary / OPTIMIZER_FILE)
        record = {
            **record, "lora_sha256": weights_sha256(temporary), "loss_scale": policy.loss_scale.factor,
            "optimizer_sha256": sha256_of(temporary / OPTIMIZER_FILE),
        }  # fmt: skip
        (temporary / RECORD_FILE).write_text(json.dumps(record, indent=1, sort_keys=True))


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that replaces ``folder`` when all is on disk.

    Raises:
        D3POError: the disk is full or read-only; nothing is left behind.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with disk_errors(folder):
            temporary.mkdir(parents=True)
            yield temporary
            for path in temporary.rglob("*"):
                if path.is_file():
                    as_readable_as_usual(path)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_checkpoint(folder: Path, policy: Policy, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """Load weights, and optimizer state if one is given, from a checkpoint; return its JSON record.

    Raises:
        D3POError: a file is missing or differs from what was written.
    """
    try:
        record: dict[str, Any] = json.loads((folder / RECORD_FILE).read_text())
        found = weights_sha256(folder)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise D3POError(f"checkpoint {folder}: cannot be read ({error}); restore it or start a new campaign") from None
    if not isinstance(record, dict) or found != record.get("lora_sha256"):
        name = weights_file(folder).name
        raise D3POError(f"checkpoint {folder}: {name} was changed since it was written; restore it from a copy")
    policy.weights.load(folder)
    policy.loss_scale.factor = min(policy.loss_scale.first, record.get("loss_scale", policy.loss_scale.first))
    if optimizer is not None:
        if record.get("optimizer_sha256") not in (None, _digest(folder / OPTIMIZER_FILE)):
            raise D3POError(
                f"checkpoint {folder}: {OPTIMIZER_FILE} was changed since it was written; restore it from a copy, or "
                "set train.carry_optimizer to false"
            )
        _load_optimizer_state(folder / OPTIMIZER_FILE, policy, optimizer)
    return record


def _digest(path: Path) -> str | None:
    return sha256_of(path) if path.is_file() else None


def load_round(
    campaign: Path, round_number: int, policy: Policy, optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Load a round's end state into the policy, and into the optimizer if given; round 0 is the base model.

    Raises:
        D3POError: the round's checkpoint is missing or differs from what was written.
    """
    relative = checkpoint_path(round_number)
    if relative is None:
        policy.reset()
    else:
        load_checkpoint(campaign / relative, policy, optimizer)


def computed_on(policy: Policy) -> dict[str, Any]:
    """Return what rounding depends on: ``device``, CPU ``threads``, ``torch`` version, ``processes``."""
    device = torch.cuda.get_device_name(policy.device) if policy.device.type == "cuda" else policy.device.type
    return {
        "device": device, "threads": torch.get_num_threads(), "torch": torch.__version__,
        "processes": policy.accelerator.num_processes,
    }  # fmt: skip


def optimizer_state(policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return the optimizer's state by weight name, on the CPU."""
    state = {}
    for name, parameter in policy.weights.parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            value = torch.as_tensor(value).detach()
            # Always copy: some optimizers share tables between parameters, which safetensors refuses.
            state[f"{name}.{key}"] = value.to("cpu", copy=True, memory_format=torch.contiguous_format)
    return state


def _load_optimizer_state(path: Path, policy: Policy, optimizer: torch.optim.Optimizer) -> None:
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise D3POError(
            f"{path}: cannot be read ({error}); restore it, or set train.carry_optimizer to false"
        ) from None
    values: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in state.items():
        name, _, kind = key.rpartition(".")
        values.setdefault(name, {})[kind] = value
    kinds = {kind for moments in values.values() for kind in moments}
    if kinds and ("exp_avg" in kinds) != isinstance(optimizer, torch.optim.AdamW):
        raise D3POError(
            f"{path}: was written with another train.optimizer; set that back, or set train.carry_optimizer to false"
        )
    for name, parameter in policy.weights.parameters():
        if name in values:
            optimizer.state[parameter] = {kind: _placed(value, parameter) for kind, value in values[name].items()}


def _placed(value: torch.Tensor, parameter: torch.nn.Parameter) -> torch.Tensor | int:
    """Restore a saved value; a moment gets its parameter's memory layout, so that it rounds as before."""
    if value.ndim == 0:
        return value if value.is_floating_point() else int(value)
    if value.shape == parameter.shape:
        return torch.empty_like(parameter, dtype=value.dtype).copy_(value)
    return value.to(parameter.device)
