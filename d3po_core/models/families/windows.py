"""Long prompts for CLIP: windows of 75 tokens, each encoded alone, as AUTOMATIC1111's web UI and compel read them.

The web UI may also end a window early, at a comma; compel and this file do not.
"""

from typing import Any

import torch


def token_windows(tokenizer: Any, prompt: str) -> list[list[int]]:
    """Return a prompt's tokens in windows, each with start and end, padded to what the encoder reads; at least one."""
    tokens = tokenizer(prompt, add_special_tokens=False, truncation=False).input_ids
    length = tokenizer.model_max_length
    room = length - 2
    return [_whole(tokenizer, tokens[start : start + room], length) for start in range(0, max(len(tokens), 1), room)]


def _whole(tokenizer: Any, tokens: list[int], length: int) -> list[int]:
    window = [tokenizer.bos_token_id, *tokens, tokenizer.eos_token_id]
    return window + [tokenizer.pad_token_id] * (length - len(window))


def encoded(tokenizer: Any, encoder: Any, prompt: str, windows: int, device: torch.device) -> list[Any]:
    """Return what a CLIP text encoder says of each window of a prompt; empty windows follow up to their number."""
    own = token_windows(tokenizer, prompt)
    empty = [_whole(tokenizer, [], tokenizer.model_max_length)] * (windows - len(own))
    return [encoder(torch.tensor([ids], device=device), output_hidden_states=True) for ids in (own + empty)[:windows]]
