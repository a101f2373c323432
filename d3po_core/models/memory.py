"""Memory plans: what stays on the GPU, and how many rows pass through the network at once.

A plan decides how work is split, never what is computed: results are the same up to rounding. A campaign whose
``model.memory`` is ``auto`` keeps its plan in ``memory.json``, so that every run of it splits work alike.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from d3po_core.config import CampaignConfig, ModelConfig
from d3po_core.errors import D3POError
from d3po_core.store.files import atomic_path
from d3po_core.store.sealed import read_sealed, sealed

PLAN_FILE = "memory.json"
RESTORE = "restore it, or remove it: the next run then measures the GPU again"


@dataclass(frozen=True)
class MemoryPlan:
    """How a policy shares a GPU's memory.

    Attributes:
        stays: whether idle parts and a round's latents stay on the GPU; else they wait in main memory.
        recomputes: whether the backward pass computes activations again (gradient checkpointing).
        trained: the most image-steps at once in training; None for ``train.micro_batch``.
        sampled: the most images at once in sampling; None for ``sample.batch_size``.
        decoded: images at once in decoding.
        needs: the bytes of GPU memory that the plan was measured to need; 0 if it was not measured.
    """

    stays: bool
    recomputes: bool
    trained: int | None
    sampled: int | None
    decoded: int
    needs: int = 0

    def __str__(self) -> str:
        """Return the plan in words, for logs."""
        recomputed = ", activations recomputed" if self.recomputes else ""
        rows = [f"{most} {what}" for most, what in ((self.trained, "image-steps in training"),
                (self.sampled, "images in sampling"), (self.decoded, "in decoding")) if most]  # fmt: skip
        needed = f"; about {self.needs / 1e9:.1f} GB" if self.needs else ""
        return f"at most {', '.join(rows)} at once{recomputed}; idle parts {'stay' if self.stays else 'leave'}{needed}"


PLANS = {
    "fast": MemoryPlan(stays=True, recomputes=False, trained=None, sampled=None, decoded=16),
    "balanced": MemoryPlan(stays=False, recomputes=False, trained=16, sampled=16, decoded=8),
    "medium": MemoryPlan(stays=False, recomputes=True, trained=8, sampled=8, decoded=2),
    "small": MemoryPlan(stays=False, recomputes=True, trained=2, sampled=4, decoded=1),
}


class Card:
    """The memory of this process's GPU, as far as the process may use it."""

    def __init__(self) -> None:
        self._device = torch.cuda.current_device()

    @property
    def name(self) -> str:
        """Return the GPU's name."""
        return torch.cuda.get_device_name(self._device)

    def budget(self) -> int:
        """Return the bytes that this process has and can still get, within its limit if it set one."""
        free, total = torch.cuda.mem_get_info(self._device)
        allowed = total * torch.cuda.get_per_process_memory_fraction(self._device)
        return min(free + torch.cuda.memory_reserved(self._device), int(allowed))

    def start(self) -> None:
        """Forget the peak so far."""
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)

    def peak(self) -> int:
        """Return the most bytes allocated since ``start``."""
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device)


def read_plan(campaign: Path, config: ModelConfig, card: Card) -> MemoryPlan | None:
    """Return the plan that an ``auto`` campaign settled on; None if it has none for this precision.

    Raises:
        D3POError: the file is damaged, or this GPU has less memory than the plan needs.
    """
    path = campaign / PLAN_FILE
    if not path.exists():
        return None
    found = read_sealed(path, RESTORE)
    if found["for"] != _depends_on(config):
        return None
    plan, budget = MemoryPlan(**found["plan"]), card.budget()
    if plan.needs > budget:
        raise D3POError(
            f"{path}: the campaign's model.memory 'auto' was measured on {found['gpu']} and needs "
            f"{plan.needs / 1e9:.1f} GB, but this GPU gives {budget / 1e9:.1f} GB; free some, or remove the file to "
            "measure this one (results stay the same up to rounding)"
        )
    return plan


def write_plan(campaign: Path, config: ModelConfig, card: Card, plan: MemoryPlan) -> None:
    """Write the plan that all further runs of the campaign use, unless the file already holds it."""
    if read_plan(campaign, config, card) == plan:
        return
    content: dict[str, Any] = {"plan": asdict(plan), "for": _depends_on(config), "gpu": card.name}
    with atomic_path(campaign / PLAN_FILE) as temporary:
        temporary.write_text(sealed(content))


def _depends_on(config: ModelConfig) -> dict[str, Any]:
    """Return the fields that may change between rounds and change how much memory a row takes."""
    return config.model_dump(mode="json", include={"precision", "compile"})


def plan_in_words(config: CampaignConfig) -> str | None:
    """Return one line on the plan that an ``auto`` campaign follows and where it is kept; None if it has none."""
    path = config.folder / PLAN_FILE
    if config.model.memory != "auto" or not path.exists():
        return None
    found = read_sealed(path, RESTORE)
    return f"model.memory auto, measured on {found['gpu']}: {MemoryPlan(**found['plan'])} ({PLAN_FILE})"
