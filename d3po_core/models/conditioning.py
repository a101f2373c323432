"""What a pass through the network is conditioned on: embeddings of prompts and of the negative prompt, and guidance."""

from dataclasses import dataclass

import torch

from d3po_core.models.asked import Asked
from d3po_core.models.families import Embedding, Family, Guidance
from d3po_core.models.text_cache import Text, TextCache


@dataclass(frozen=True)
class Conditioning:
    """Embeddings of B prompts and of the negative prompt, the guidance scale, and how the network is guided.

    Attributes:
        parts: rows of texts of unequal length that must not be padded, each with its own conditioning; then the others
            are empty.
    """

    embeddings: Embedding
    empty: Embedding
    guidance_scale: float
    guidance: Guidance = "two passes"
    parts: tuple[tuple[torch.Tensor, "Conditioning"], ...] = ()

    @property
    def guided(self) -> bool:
        """Return whether a pass has two rows per image, one of them for the negative prompt."""
        return self.guidance == "two passes" and self.guidance_scale != 1.0


class TextReader:
    """Makes conditionings of prompts.

    Args:
        family: the model's family.
        asked: the negative prompt, and how long prompts are read.
        cache: embeds texts.
        device: the network's device.
    """

    def __init__(self, family: Family, asked: Asked, cache: TextCache, device: torch.device) -> None:
        self._family, self._asked, self._cache, self._device = family, asked, cache, device

    def conditioning(self, prompts: list[str], guidance_scale: float) -> Conditioning:
        """Return the conditioning of prompts; texts that are read in more windows have a part of their own.

        Empty windows are not neutral, so a prompt must not get more of them because of another in its batch.
        """
        windows = [self._windows(prompt) for prompt in prompts]
        self._cache.embed(
            text
            for prompt, count in dict.fromkeys(zip(prompts, windows, strict=True))
            for text in (Text(prompt, windows=count), self._negative(count))
        )
        if len(set(windows)) == 1:
            return self._alike(prompts, windows[0], guidance_scale)
        parts = []
        for count in sorted(set(windows)):
            rows = [row for row, own in enumerate(windows) if own == count]
            part = self._alike([prompts[row] for row in rows], count, guidance_scale)
            parts.append((torch.tensor(rows, device=self._device), part))
        return Conditioning({}, {}, guidance_scale, self._family.guidance, tuple(parts))

    def _windows(self, prompt: str) -> int:
        if not self._asked.by_windows:
            return 1
        return max(self._family.windows(prompt), self._family.windows(self._asked.negative_prompt))

    def _negative(self, windows: int) -> Text:
        return Text(self._asked.negative_prompt, True, windows)

    def _alike(self, prompts: list[str], windows: int, guidance_scale: float) -> Conditioning:
        texts = [*(Text(prompt, windows=windows) for prompt in prompts), self._negative(windows)]
        # Together, so that texts of unequal length become equal.
        both = self._family.stack([self._cache[text] for text in texts])
        stacked = {name: value[:-1].to(self._device) for name, value in both.items()}
        empty = {name: value[-1].to(self._device) for name, value in both.items()}
        return Conditioning(stacked, empty, guidance_scale, self._family.guidance)
