"""Embeddings of the prompts that were needed lately."""

from collections import OrderedDict

import torch

from d3po_core.models.families import Embedding, Family
from d3po_core.models.placement import Placement

MOST_EMBEDDINGS = 4096


class TextCache:
    """Embeds prompts, and keeps the latest; a prompt that is kept does not pass through the text encoder again.

    Args:
        family: embeds one prompt.
        placement: brings the text encoders to the device.
        device: where they compute.
        keep_on: where embeddings are kept.
    """

    def __init__(self, family: Family, placement: Placement, device: torch.device, keep_on: torch.device) -> None:
        self._family, self._placement, self._device, self._keep_on = family, placement, device, keep_on
        self._kept: OrderedDict[str, Embedding] = OrderedDict()

    def __getitem__(self, prompt: str) -> Embedding:
        """The embedding of a prompt that was embedded in the latest ``embed``."""
        return self._kept[prompt]

    @torch.no_grad()
    def embed(self, prompts: list[str]) -> None:
        """Have the embeddings of all these prompts, and forget the oldest of the others."""
        if all(prompt in self._kept for prompt in prompts):
            return
        with self._placement.on_device(*self._family.TEXT_PARTS):
            # One prompt at a time: a prompt's embedding then cannot depend on which others came with it.
            for prompt in prompts:
                if prompt not in self._kept:
                    embedding = self._family.embed(prompt, self._device)
                    self._kept[prompt] = {name: value.to(self._keep_on) for name, value in embedding.items()}
                self._kept.move_to_end(prompt)
        while len(self._kept) > max(MOST_EMBEDDINGS, len(prompts)):
            self._kept.popitem(last=False)
