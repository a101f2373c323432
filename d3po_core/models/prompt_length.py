"""Count and name the prompts that a model's text encoders cut, before a round starts."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from d3po_core.config import ModelConfig
from d3po_core.errors import D3POError
from d3po_core.models.model_files import family_of
from d3po_core.models.places import model_folder

NAMED = 3


def check_length(config: ModelConfig, prompts: Iterable[str]) -> list[str]:
    """Return one line per encoder about the prompts it cuts; none if the tokenizers are not on this machine.

    Raises:
        D3POError: every encoder reads two prompts as the same.
    """
    folder = model_folder(config)
    if folder is None:
        return []
    distinct, windows = list(dict.fromkeys(prompts)), family_of(config, folder).TEXT_WINDOWS
    warnings, shortened = [], set[str]()
    read: dict[str, tuple[Any, ...]] = dict.fromkeys(distinct, ())
    for name, tokenizer in _tokenizers(config, folder).items():
        window = min(int(tokenizer.model_max_length), windows.get(name, int(tokenizer.model_max_length)))
        tokens = dict(zip(distinct, tokenizer(distinct, truncation=False).input_ids, strict=True))
        cut = [prompt for prompt in distinct if len(tokens[prompt]) > window]
        # The window's last place holds the end token.
        read = {prompt: (*before, tuple(tokens[prompt][: window - 1])) for prompt, before in read.items()}
        shortened |= set(cut)
        if cut:
            warnings.append(_warning(name, window, cut, tokens))
    _require_distinct(read, shortened)
    return warnings


def _tokenizers(config: ModelConfig, folder: Path) -> dict[str, Any]:
    family = family_of(config, folder)
    names = [part.replace("text_encoder", "tokenizer") for part in family.TEXT_PARTS]
    try:
        return {name: AutoTokenizer.from_pretrained(folder / name) for name in names if (folder / name).is_dir()}
    except Exception as error:  # the library raises anything on wrong files
        raise D3POError(f"model.path {config.path!r}: a tokenizer cannot be read ({str(error)[:200]})") from None


def _warning(name: str, window: int, cut: list[str], tokens: dict[str, list[int]]) -> str:
    shown = "; ".join(f"{prompt[:60]!r} ({len(tokens[prompt])})" for prompt in cut[:NAMED])
    more = f" and {len(cut) - NAMED} more" if len(cut) > NAMED else ""
    return (
        f"{len(cut)} prompt{'s are' if len(cut) > 1 else ' is'} longer than the {window} tokens that {name} reads, and "
        f"what lies beyond is not seen: {shown}{more}"
    )


def _require_distinct(read: dict[str, tuple[Any, ...]], shortened: set[str]) -> None:
    first: dict[tuple[Any, ...], str] = {}
    for prompt, seen in read.items():
        other = first.setdefault(seen, prompt)
        if other != prompt and shortened & {other, prompt}:
            raise D3POError(
                f"the prompts {other[:80]!r} and {prompt[:80]!r} are the same to the model's text encoders, which read "
                "only so far; make them differ earlier, or drop one"
            )
