"""Watch what a campaign's numbers depend on besides its configuration: held-out prompts and files.

The campaign stores its held-out prompts when it is opened. It also stores digests of the model's files, of the LoRA to
start from, of learned scorers' weights, and of the module of a scorer that is the user's own function. A change is an
error before any work; ``accept_changes`` records it instead. Training prompts may change: each round notes the digest
of those it drew from.
"""

import hashlib
import importlib.util
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from d3po_core.config import CampaignConfig, is_url
from d3po_core.errors import D3POError
from d3po_core.models.places import cached_folder, start_place
from d3po_core.paths import resolve_path
from d3po_core.store.files import atomic_path
from d3po_core.store.integrity import RESTORE, sha256_of
from d3po_core.store.sealed import read_sealed, sealed

FROZEN_FILE = "frozen.json"
NAMED = 3
START = "LoRA to start from"


def freeze(config: CampaignConfig, held_out: list[str], evaluated: Iterable[str] = ()) -> list[str]:
    """Store the campaign's prompts and digests, or check them against the stored ones; return accepted changes.

    Args:
        config: the campaign's configuration; ``accept_changes`` allows changed files, never changed held-out prompts.
        held_out: the evaluated prompts, as their file has them now.
        evaluated: prompts that a campaign of an earlier version has evaluated; empty if it has not begun.

    Raises:
        D3POError: something changed; one line that names it.
    """
    path = config.folder / FROZEN_FILE
    known = read_sealed(path, RESTORE) if path.exists() else {}
    prompts = known.get("held_out") or list(dict.fromkeys(evaluated)) or held_out
    _require_prompts(config, prompts, held_out)
    files = digests_of(config, known.get("files") or {})
    changes = _changes(known.get("files") or {}, files)
    if changes and not config.accept_changes:
        raise D3POError(
            f"campaign {config.campaign!r}: {changes[0]}{_more(changes)}; rounds before and after could not be "
            "compared. Restore it, start another campaign, or go on with --set accept_changes=true, which records it"
        )
    accepted = known.get("accepted", [])
    if changes:
        accepted = [*accepted, {"at": datetime.now(UTC).isoformat(timespec="seconds"), "changes": changes}]
    found = {"held_out": prompts, "files": files, "accepted": accepted}
    if found != known:
        with atomic_path(path) as temporary:
            temporary.write_text(sealed(found))
    return changes


def prompts_sha256(prompts: list[str]) -> str:
    """Return the digest of a list of prompts, which depends on their order."""
    return hashlib.sha256("\n".join(prompts).encode("utf-8", "surrogatepass")).hexdigest()


def digests_of(config: CampaignConfig, known: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Return each file's size, time of last change and SHA-256; skip reading if size and time are unchanged."""
    found = {}
    for what, file in _watched(config):
        status = file.stat()
        before = known.get(what)
        same = before is not None and before[:2] == [status.st_size, status.st_mtime_ns]
        found[what] = before if before and same else [status.st_size, status.st_mtime_ns, sha256_of(file)]
    return found


def _watched(config: CampaignConfig) -> list[tuple[str, Path]]:
    """Return the files on this machine that the numbers depend on, each with its name for messages."""
    model = config.model
    places = {"model": model.path, "model configuration": model.single_file_config, START: model.start_from}
    for name in dict.fromkeys((*config.judge.scorers, *config.evaluation_scorers)):
        where = config.scoring.models.get(name)
        if where and not is_url(where):
            places[f"scorer {name}"] = where
        elif ":" in name:
            places[f"scorer {name}"] = _module_of(name)
    watched = []
    for what, place in places.items():
        root = resolve_path(place) if place else None
        if place and root and not root.exists() and what.startswith("model"):
            root = cached_folder(place, model.revision)
        if what == START:
            root = start_place(model)
        if root is None or not root.exists():
            continue
        files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file() and _counts(p, root))
        top = root.parent if root.is_file() else root
        watched += [(f"{what}: {file.relative_to(top).as_posix()}", file) for file in files]
    return watched


def _counts(path: Path, root: Path) -> bool:
    """Return whether a pipeline reads the file; notes and cache files do not count."""
    return not any(part.startswith(".") for part in path.relative_to(root).parts) and path.suffix in (
        ".json", ".safetensors", ".txt", ".model", ".py",
    )  # fmt: skip


def _module_of(name: str) -> str | None:
    """Return the module file of a scorer ``package.module:function``, without running it."""
    try:
        found = importlib.util.find_spec(name.partition(":")[0])
    except (ImportError, ValueError):
        return None
    return found.origin if found else None


def _changes(before: dict[str, list[Any]], now: dict[str, list[Any]]) -> list[str]:
    """Return the changes in places watched both before and now; a new or unused place is no change."""
    places = {name.partition(": ")[0] for name in before} & {name.partition(": ")[0] for name in now}
    changes = []
    for name in sorted(before.keys() | now.keys()):
        place, _, file = name.partition(": ")
        if place not in places or (name in before and name in now and before[name][2] == now[name][2]):
            continue
        verb = "was changed" if name in before and name in now else "is gone" if name in before else "is new"
        changes.append(f"{file} of the {place} {verb} since the campaign began")
    return changes


def _require_prompts(config: CampaignConfig, frozen: list[str], held_out: list[str]) -> None:
    gone, new = [p for p in frozen if p not in held_out], [p for p in held_out if p not in frozen]
    if not gone and not new:
        return
    told = [f"{len(prompts)} {word} ({'; '.join(map(repr, prompts[:NAMED]))})"
            for prompts, word in ((gone, "are gone"), (new, "are new")) if prompts]  # fmt: skip
    raise D3POError(
        f"campaign {config.campaign!r}: the held-out prompts changed since it began: {', '.join(told)}; put "
        f"evaluate.prompts {config.evaluate.prompts!r} back as it was, or start another campaign (--campaign NAME)"
    )


def _more(changes: list[str]) -> str:
    return f" (and {len(changes) - 1} more files)" if len(changes) > 1 else ""
