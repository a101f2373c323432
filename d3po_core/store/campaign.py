"""A campaign's folder: its lock, its saved configuration, and the configuration of each round."""

import contextlib
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from d3po_core.config import FIXED_FIELDS, FREE_FIELDS, PATH_FIELDS, CampaignConfig, is_url
from d3po_core.config_values import changed_fields, load_config
from d3po_core.errors import CampaignBusyError, D3POError
from d3po_core.paths import HERE, absolute, data_folder, resolve_path
from d3po_core.store.files import atomic_path, disk_errors, exclusive
from d3po_core.store.integrity import record_files, require_record
from d3po_core.store.sealed import read_sealed, sealed
from d3po_core.store.stages import stage_path
from d3po_core.urls import masked

CAMPAIGN_FILE = "campaign.json"
CAMPAIGN_REMEDY = "restore it from a copy, or start a new campaign"
LOCK_FILE = ".lock"


def campaign_named(name: str) -> CampaignConfig:
    """Return the saved configuration of a campaign.

    Args:
        name: the campaign's name, or the path of its folder if that lies outside the data folder (``runs_dir``).

    Raises:
        D3POError: no campaign has that name; the message lists those that exist.
    """
    if "://" in name:
        raise D3POError(
            f"--campaign {masked(name)!r}: this command needs the campaign on disk; type: d3po pull ADDRESS"
        )
    if os.sep in name:
        folder = absolute(name, HERE, "--campaign")
        problem = f"--campaign {name!r}: {folder} holds no campaign; expected a name, or a campaign's folder"
    else:
        folder = load_config({"campaign": name}, "--campaign").folder
        problem = (
            f"campaign {name!r} is not in {folder.parent}; there are {', '.join(campaign_names()) or 'none'}; "
            "of one that lies elsewhere give the folder"
        )
    if not (folder / CAMPAIGN_FILE).exists() and not (folder / "stages").exists():
        raise D3POError(problem)
    return _lying_in(_saved_config(folder / CAMPAIGN_FILE), folder)


def campaign_names() -> list[str]:
    """Return the names of the campaigns in the data folder, in order."""
    return sorted(path.parent.name for path in (data_folder() / "runs").glob(f"*/{CAMPAIGN_FILE}"))


def _saved_config(path: Path) -> CampaignConfig:
    return load_config(_renamed(_identity(path)["config"]), str(path))


def _renamed(values: dict[str, Any]) -> dict[str, Any]:
    """Return a saved configuration with today's names: processes were the model's, with a launcher."""
    model = {**values.get("model", {})}
    model.pop("launcher", None)
    if "processes" not in model:
        return {**values, "model": model}
    compute = {"processes": model.pop("processes"), **values.get("compute", {})}
    return {**values, "model": model, "compute": compute}


def _identity(path: Path) -> dict[str, Any]:
    found = read_sealed(path, CAMPAIGN_REMEDY)
    if not {"id", "config"} <= found.keys():
        raise D3POError(f"{path}: cannot be read (it lacks id or config); {CAMPAIGN_REMEDY}")
    return found


def round_config(campaign: Path, round_number: int) -> CampaignConfig:
    """Return the configuration that a round began with; ``folder`` is where the campaign lies now.

    Raises:
        D3POError: the configuration is missing or cannot be read.
    """
    path = stage_path(campaign, round_number, "config")
    require_record(campaign, round_number, "config")
    try:
        values = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise D3POError(
            f"{path}: cannot be read ({error}); restore it, the round cannot be made again without"
        ) from None
    return _lying_in(load_config(_renamed(values), str(path)), campaign)


def rules_of(campaign: Path, round_number: int | None = None) -> CampaignConfig:
    """Return the configuration whose rules hold for a round, or the last round's if no round is given.

    If the round has not begun, use the last round's; if none has begun, use the campaign's own.
    """
    if round_number is not None and stage_path(campaign, round_number, "config").exists():
        return round_config(campaign, round_number)
    numbers = [int(path.parent.name.removeprefix("round=")) for path in campaign.glob("stages/round=*/config.json")]
    if not numbers:
        return _lying_in(_saved_config(campaign / CAMPAIGN_FILE), campaign)
    return round_config(campaign, max(numbers))


def _lying_in(config: CampaignConfig, folder: Path) -> CampaignConfig:
    """Return the configuration with its folder set, since the folder may have been moved or copied."""
    usual = folder.parent.resolve() == data_folder() / "runs"
    return config.model_copy(update={"campaign": folder.name, "runs_dir": None if usual else str(folder.parent)})


def campaign_id(campaign: Path) -> str:
    """Return the campaign's id; every start makes a new one, even under an old name."""
    return str(_identity(campaign / CAMPAIGN_FILE)["id"])


def open_campaign(config: CampaignConfig) -> None:
    """Start the campaign, or check that the configuration still fits one that has started.

    Raises:
        D3POError: a fixed field changed; the message names each such field with its old and new value.
    """
    path = config.folder / CAMPAIGN_FILE
    if path.exists():
        check_fits(config)
        return
    if (config.folder / "stages").exists():
        raise D3POError(f"{path}: is gone, and the campaign has begun; {CAMPAIGN_REMEDY} (--campaign NAME)")
    identity = {"id": uuid.uuid4().hex, "config": config.model_dump(mode="json")}
    with atomic_path(path) as temporary:
        temporary.write_text(sealed(identity))


def check_fits(config: CampaignConfig) -> None:
    """Check that a configuration still fits the campaign that was started in its folder.

    Raises:
        D3POError: a fixed field changed; the message names each such field with its old and new value.
    """
    saved = _saved_config(config.folder / CAMPAIGN_FILE)
    # A server may move. Other weights would change what the held-out scores mean.
    models = {f"scoring.models.{name}" for name in config.evaluation_scorers}
    changed = [
        c for c in changed_fields(saved, config)
        if (c[0].startswith(FIXED_FIELDS) and not _same_place(c)) or (c[0] in models and not _moved_server(c))
    ]  # fmt: skip
    scorers = (list(saved.evaluation_scorers), list(config.evaluation_scorers))
    if scorers[0] != scorers[1] and not any(name == "evaluate.scorers" for name, *_ in changed):
        changed.append(("judge.scorers, which also evaluate,", *scorers))
    if changed:
        raise D3POError(f"campaign {config.campaign!r} was started with {_differences(changed)}; "
                        "set it back, or start another campaign (--campaign NAME)")  # fmt: skip


def begin_round(config: CampaignConfig, round_number: int) -> None:
    """Freeze the round's configuration, or check that it is the one the round began with.

    Raises:
        D3POError: the round began with another configuration; the message names the fields.
    """
    path = stage_path(config.folder, round_number, "config")
    if path.exists():
        saved = round_config(config.folder, round_number)
        changed = [
            c for c in changed_fields(saved, config)
            if c[0] not in FREE_FIELDS and not _moved_server(c) and not _same_place(c)
        ]  # fmt: skip
        if changed:
            raise D3POError(
                f"round {round_number} of campaign {config.campaign!r} was begun with {_differences(changed)}; "
                "finish it with that, or drop what it has: d3po discard-round"
            )
        return
    text = json.dumps(config.model_dump(mode="json"), indent=1)
    with disk_errors(path):
        record_files(config.folder, round_number, "config", lambda: text)
    with atomic_path(path) as temporary:
        temporary.write_text(text)


def _same_place(change: tuple[str, Any, Any]) -> bool:
    """Return whether two paths, typed in different folders, lead to the same place."""
    name, *places = change
    if name not in PATH_FIELDS:
        return False
    old, new = (resolve_path(place) if place and not is_url(place) else place for place in places)
    return old == new


def _moved_server(change: tuple[str, Any, Any]) -> bool:
    name, *places = change
    return name.startswith("scoring.models.") and all(is_url(place or "") for place in places)


def _differences(changed: list[tuple[str, Any, Any]]) -> str:
    return masked("; ".join(f"{name} = {old!r} (now {new!r})" for name, old, new in changed))


@contextlib.contextmanager
def campaign_lock(campaign: Path, who: str) -> Iterator[None]:
    """Lock the campaign for this process; the kernel frees the lock however the process ends.

    Raises:
        CampaignBusyError: another process holds the lock.
        D3POError: the folder cannot be written.
    """
    path = campaign / LOCK_FILE
    with contextlib.ExitStack() as stack:
        try:
            handle = stack.enter_context(exclusive(path, wait=False))
        except BlockingIOError:
            holder = path.read_text(errors="replace").strip() or "another process"
            raise CampaignBusyError(
                f"campaign {campaign.name!r} is being advanced by {holder}; wait for it, or use another --campaign"
            ) from None
        with disk_errors(path):
            os.truncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} ({who})".encode(), 0)
        yield
