"""Texts of unequal length in one batch: padded at the end, with a mask."""

from collections.abc import Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from d3po_core.models.families.family import Embedding

STATES, MASK = "encoder_hidden_states", "encoder_hidden_states_mask"


def stack_padded(embeddings: Sequence[Embedding]) -> Embedding:
    """Return states ``[B, L, D]`` as long as the longest, with a mask ``[B, L]`` if their lengths differ."""
    states = [embedding[STATES] for embedding in embeddings]
    padded = {STATES: pad_sequence(states, batch_first=True)}
    if len({len(state) for state in states}) == 1:
        return padded
    ones = [torch.ones(len(state), dtype=torch.long, device=state.device) for state in states]
    return padded | {MASK: pad_sequence(ones, batch_first=True)}
