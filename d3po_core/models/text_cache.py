"""A cache of recent prompts' embeddings."""

from collections import OrderedDict
from collections.abc import Iterable
from typing import NamedTuple

import torch

from d3po_core.models.families import Embedding, Family
from d3po_core.models.placement import Placement

MOST_EMBEDDINGS = 4096


class Text(NamedTuple):
    """A text as an encoder reads it: whether guidance leads away from it, and in how many windows."""

    prompt: str
    negative: bool = False
    windows: int = 1


class TextCache:
    """Embeds texts and caches the latest; a cached text skips the text encoder.

    Args:
        family: embeds one text.
        placement: moves the text encoders to the device.
        device: the text encoders' device.
        keep_on: the device that holds the embeddings.
    """

    def __init__(self, family: Family, placement: Placement, device: torch.device, keep_on: torch.device) -> None:
        self._family, self._placement, self._device, self._keep_on = family, placement, device, keep_on
        self._kept: OrderedDict[Text, Embedding] = OrderedDict()

    def __getitem__(self, text: Text) -> Embedding:
        """Return the embedding of a text from the latest ``embed``."""
        return self._kept[text]

    @torch.no_grad()
    def embed(self, texts: Iterable[Text]) -> None:
        """Embed all these texts, and drop the oldest of the others."""
        wanted = list(dict.fromkeys(texts))
        if all(text in self._kept for text in wanted):
            return
        with self._placement.on_device(*self._family.TEXT_PARTS):
            # One at a time, so that an embedding cannot depend on the other texts in a batch.
            for text in wanted:
                if text not in self._kept:
                    self._kept[text] = {name: value.to(self._keep_on) for name, value in self._embedded(text).items()}
                self._kept.move_to_end(text)
        while len(self._kept) > max(MOST_EMBEDDINGS, len(wanted)):
            self._kept.popitem(last=False)

    def _embedded(self, text: Text) -> Embedding:
        if text.windows > 1:
            return self._family.embed_windows(text.prompt, text.windows, self._device)
        embed = self._family.embed_negative if text.negative else self._family.embed
        return embed(text.prompt, self._device)
