"""Count and name the prompts that are too long for a model's text encoders, before a round starts."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from d3po_core.config import ModelConfig
from d3po_core.errors import D3POError
from d3po_core.models.model_files import family_of
from d3po_core.models.places import model_folder

NAMED = 3


def check_length(
    config: ModelConfig, prompts: Iterable[str], long_prompts: str = "truncate", negative_prompt: str = ""
) -> list[str]:
    """Return one line per encoder about the prompts that are too long for it; none if no tokenizer is here.

    Args:
        config: the model.
        prompts: the prompts, training and held-out.
        long_prompts: what is done with them, as in ``sample.long_prompts``.
        negative_prompt: what guidance leads away from; it is counted too.

    Raises:
        D3POError: some are too long and that is an error, or every encoder reads two prompts as the same.
    """
    folder = model_folder(config)
    if folder is None:
        return []
    distinct, family = list(dict.fromkeys([*prompts, *filter(None, [negative_prompt])])), family_of(config, folder)
    warnings, shortened = [], set[str]()
    read: dict[str, tuple[Any, ...]] = dict.fromkeys(distinct, ())
    for name, tokenizer in _tokenizers(config, folder).items():
        most = int(tokenizer.model_max_length)
        window = min(most, family.TEXT_WINDOWS.get(name, most))
        tokens = dict(zip(distinct, tokenizer(distinct, truncation=False).input_ids, strict=True))
        cut = [prompt for prompt in distinct if len(tokens[prompt]) > window]
        # The window's last place holds the end token.
        read = {prompt: (*before, tuple(tokens[prompt][: window - 1])) for prompt, before in read.items()}
        shortened |= set(cut)
        if cut:
            warnings.append(_warning(name, window, cut, tokens, long_prompts))
    if warnings and long_prompts == "error":
        raise D3POError(f"{'; '.join(warnings)}; shorten them, or set sample.long_prompts to another value")
    if long_prompts != "chunk":
        _require_distinct(read, shortened)
    return warnings


def _tokenizers(config: ModelConfig, folder: Path) -> dict[str, Any]:
    family = family_of(config, folder)
    names = [part.replace("text_encoder", "tokenizer") for part in family.TEXT_PARTS]
    try:
        return {name: AutoTokenizer.from_pretrained(folder / name) for name in names if (folder / name).is_dir()}
    except Exception as error:  # the library raises anything on wrong files
        raise D3POError(f"model.path {config.path!r}: a tokenizer cannot be read ({str(error)[:200]})") from None


def _warning(name: str, window: int, cut: list[str], tokens: dict[str, list[int]], long_prompts: str) -> str:
    shown = "; ".join(f"{prompt[:60]!r} ({len(tokens[prompt])})" for prompt in cut[:NAMED])
    more = f" and {len(cut) - NAMED} more" if len(cut) > NAMED else ""
    most = -(-(max(len(tokens[prompt]) for prompt in cut) - 2) // (window - 2))
    what = {
        "truncate": ", and what lies beyond is not seen",
        "error": ", and sample.long_prompts is 'error'",
        "chunk": f", and are read in up to {most} windows of {window - 2}",
    }[long_prompts]
    return (
        f"{len(cut)} prompt{'s are' if len(cut) > 1 else ' is'} longer than the {window} tokens that {name} reads"
        f"{what}: {shown}{more}"
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
