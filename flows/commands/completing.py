"""What the shell completes: campaigns, deployments, fields and their values; nothing here imports torch."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, Literal, get_args, get_origin

from d3po_core.errors import D3POError

Choices = list[tuple[str, str]]
SCORER_FIELDS = ("judge.scorers", "evaluate.scorers", "evaluate.unseen")


def campaigns(incomplete: str) -> Choices:
    """Names of the campaigns in the data folder."""
    from d3po_core.store.campaign import campaign_names

    with contextlib.suppress(D3POError, OSError):
        return _fitting(((name, "") for name in campaign_names()), incomplete)
    return []


def deployments(incomplete: str) -> Choices:
    """Names of the deployments that advance a campaign, with their descriptions."""
    from d3po.flows.presets import descriptions

    with contextlib.suppress(D3POError):
        return _fitting(descriptions().items(), incomplete)
    return []


def settings(incomplete: str) -> Choices:
    """Fields, followed by ``=``; after it, the field's values."""
    from d3po_core.config_values import field_names

    name, given, value = incomplete.partition("=")
    fields = field_names()
    if given:
        *before, last = value.rpartition(",") if name in SCORER_FIELDS else ("", value)
        start = f"{name}={''.join(before)}"
        values = _values(name, fields[name].annotation) if name in fields else ()
        return _fitting(((start + known, "") for known in values), start + last)
    return _fitting(((f"{field}=", info.description or "") for field, info in fields.items()), name)


def _values(field: str, annotation: Any) -> Iterator[str]:
    """The values that a field may have, if they are few."""
    if field in SCORER_FIELDS:
        from d3po_core.scorers.finding import BUILT_IN, MODELS

        yield from (*BUILT_IN, *MODELS)
    elif annotation is bool:
        yield from ("true", "false")
    elif get_origin(annotation) is Literal:
        yield from get_args(annotation)
    for part in get_args(annotation) if get_origin(annotation) is not Literal else ():
        yield from _values("", part)


def _fitting(choices: Iterable[tuple[str, str]], incomplete: str) -> Choices:
    return [choice for choice in choices if choice[0].startswith(incomplete)]
