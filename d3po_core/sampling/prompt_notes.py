"""Notes on prompts before anything is drawn: their number, and those that look like something else."""

import re
import unicodedata
from collections.abc import Callable

_LIST_ITEM = re.compile(r"[0-9]+[.)] ")
_OTHER_PROGRAMS = re.compile(r"<(?:lora|lyco|hypernet):|__[\w/-]+__|\{[^{}]*\|[^{}]*\}")


def _control(prompt: str) -> bool:
    return any(unicodedata.category(letter) in ("Cc", "Zl", "Zp") for letter in prompt)


_ODD: tuple[tuple[str, Callable[[str], object]], ...] = (
    ("begin with # or //, but comments are not skipped", lambda prompt: prompt.startswith(("#", "//"))),
    ("hold a tab or another control character", _control),
    ("hold wildcards or LoRA tags of another program, which are drawn as plain words", _OTHER_PROGRAMS.search),
)
# Fine for a single prompt, but suspicious if every prompt of a list matches.
_ODD_IF_ALL: tuple[tuple[str, Callable[[str], object]], ...] = (
    ("begin with a number as in a list", _LIST_ITEM.match),
    ("stand between quotes", lambda prompt: len(prompt) > 1 and prompt[0] == prompt[-1] == '"'),
)


def prompt_notes(prompts: list[str], field: str) -> list[str]:
    """Return one line per kind of text that does not look like a prompt.

    Args:
        prompts: the prompts as they will be drawn.
        field: name of the configuration field, shown in the lines.
    """
    notes = []
    for what, is_odd in _ODD + (_ODD_IF_ALL if len(prompts) > 1 else ()):
        found = [prompt for prompt in prompts if is_odd(prompt)]
        if found and ((what, is_odd) in _ODD or len(found) == len(prompts)):
            notes.append(f"{field}: {len(found):,} of {len(prompts):,} prompts {what} ({_short(found[0])} first)")
    return notes


def prompts_shown(prompts: list[str], field: str) -> str:
    """Return a line with the number of prompts and the first few."""
    more = ", ..." if len(prompts) > 3 else ""
    return f"{field}: {len(prompts):,} prompts: {', '.join(map(_short, prompts[:3]))}{more}"


def _short(prompt: str) -> str:
    return repr(prompt if len(prompt) <= 60 else f"{prompt[:57]}...")
