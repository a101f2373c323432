"""A cache of recent prompts' embeddings."""

from collections import OrderedDict

import torch

from d3po_core.models.families import Embedding, Family
from d3po_core.models.placement import Placement

MOST_EMBEDDINGS = 4096


class TextCache:
    """Embeds prompts and caches the latest; a cached prompt skips the text encoder.

    Args:
        family: embeds one prompt.
        placement: moves the text encoders to the device.
        device: the text encoders' device.
        keep_on: the device that holds the embeddings.
    """

    def __init__(self, family: Family, placement: Placement, device: torch.device, keep_on: torch.device) -> None:
        self._family, self._placement, self._device, self._keep_on = family, placement, device, keep_on
        self._kept: OrderedDict[str, Embedding] = OrderedDict()

    def __getitem__(self, prompt: str) -> Embedding:
        """Return the embedding of a prompt from the latest ``embed``."""
        return self._kept[prompt]

    @torch.no_grad()
    def embed(self, prompts: list[str]) -> None:
        """Embed all these prompts, and drop the oldest of the others."""
        if all(prompt in self._kept for prompt in prompts):
            return
        with self._placement.on_device(*self._family.TEXT_PARTS):
            # One at a time, so that an embedding cannot depend on the other prompts in a batch.
            for prompt in prompts:
                if prompt not in self._kept:
                    embedding = self._family.embed(prompt, self._device)
                    self._kept[prompt] = {name: value.to(self._keep_on) for name, value in embedding.items()}
                self._kept.move_to_end(prompt)
        while len(self._kept) > max(MOST_EMBEDDINGS, len(prompts)):
            self._kept.popitem(last=False)
