"""A campaign's folder: who may write it, what it was started with, which rounds are finished, where things lie."""

import contextlib
import json
import math
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import psutil

from d3po_core.config import (
    FIXED_FIELDS,
    FREE_FIELDS,
    CampaignConfig,
    absolute,
    changed_fields,
    data_folder,
    is_url,
    load_config,
)
from d3po_core.errors import CampaignBusyError, D3POError
from d3po_core.integrity import record_files, require_record, was_finished
from d3po_core.records import GuardRecord, Record, RoundRecord, ScoreSummary
from d3po_core.sealed import read_sealed, sealed
from d3po_core.tables import SCHEMAS, atomic_path, disk_errors, exclusive, partition, read_rows
from d3po_core.urls import masked

CAMPAIGN_FILE = "campaign.json"
CAMPAIGN_REMEDY = "restore it from a copy, or start a new campaign"
TARGET_FILE = "target.json"
LOCK_FILE = ".lock"

StageRecord = TypeVar("StageRecord", bound=Record)


def checkpoint_path(round_number: int) -> str | None:
    """Checkpoint folder of a round, relative to the campaign; None for round 0, the base model."""
    return f"checkpoints/round={round_number}" if round_number else None


def stage_path(campaign: Path, round_number: int, stage: str) -> Path:
    """The record of a finished stage: it exists when, and only when, the stage's output is whole."""
    return campaign / "stages" / f"round={round_number}" / f"{stage}.json"


def finish_stage(
    campaign: Path, round_number: int, stage: str, kind: type[StageRecord], work: Callable[[], StageRecord]
) -> StageRecord:
    """Do a stage's work once: a finished stage gives its record back without working.

    The work must leave the same files when it is done again from any point at which it can be killed. The record's
    ``seconds`` are those of all attempts.

    Args:
        campaign: the campaign's folder.
        round_number: the round.
        stage: the stage's name.
        kind: the record's class.
        work: does the stage and returns its record.
    """
    path = stage_path(campaign, round_number, stage)
    if was_finished(campaign, round_number, stage):
        return read_record(campaign, round_number, stage, kind)
    earlier, started = seconds_spent(campaign, round_number, stage), time.perf_counter()
    record = work()

    def timed() -> str:
        seconds = earlier + time.perf_counter() - started
        finished = record.model_copy(update={"seconds": seconds, "finished_at": datetime.now(UTC)})
        return finished.model_dump_json(indent=1)

    with disk_errors(path):
        text = record_files(campaign, round_number, stage, timed)
    with atomic_path(path) as temporary:
        temporary.write_text(text)
    _seconds_path(campaign, round_number, stage).unlink(missing_ok=True)
    return kind.model_validate_json(text)


def _seconds_path(campaign: Path, round_number: int, stage: str) -> Path:
    return stage_path(campaign, round_number, stage).with_suffix(".seconds")


def seconds_spent(campaign: Path, round_number: int, stage: str) -> float:
    """What earlier attempts at a stage noted that it has taken so far; 0 when there was none."""
    try:
        return float(_seconds_path(campaign, round_number, stage).read_text())
    except (OSError, ValueError):  # none, or its last note was cut off
        return 0.0


def note_seconds(campaign: Path, round_number: int, stage: str, seconds: float) -> None:
    """Note what a stage has taken so far, all attempts together, for one that may have to go on from here."""
    with contextlib.suppress(OSError):  # a disk that is full is the work's to find
        path = _seconds_path(campaign, round_number, stage)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{seconds:.3f}")


def read_record(campaign: Path, round_number: int, stage: str, kind: type[StageRecord]) -> StageRecord:
    """The record that a finished stage left.

    Raises:
        D3POError: it is gone or damaged.
    """
    path = stage_path(campaign, round_number, stage)
    require_record(campaign, round_number, stage)
    try:
        return kind.model_validate_json(path.read_text())
    except (OSError, ValueError) as error:
        reason = "it is gone" if isinstance(error, FileNotFoundError) else "it is damaged"
        raise D3POError(
            f"{path}: the record of a finished stage cannot be read ({reason}); restore it from a copy, or drop the "
            "round if it is not finished: d3po discard-round"
        ) from None


def start_of(campaign: Path, round_number: int) -> int:
    """The round whose checkpoint a round starts from: the one before, unless the guard went back to another."""
    before = round_number - 1
    if not was_finished(campaign, before, "guard"):
        return before
    return read_record(campaign, before, "guard", GuardRecord).go_on_from


def finished_numbers(campaign: Path) -> list[int]:
    """Numbers of the finished rounds, in order: those that have a row in ``rounds``; 0 is the base."""
    rows = {path.parent.name for path in campaign.glob("rounds/round=*/*.parquet")}
    # A row that was noted and is gone is not a round that never was: who reads it is told.
    noted = {path.parent.name for path in campaign.glob("stages/round=*/publish.files")}
    return sorted(int(name.removeprefix("round=")) for name in rows | noted)


def last_finished_round(campaign: Path) -> int:
    """Number of the last finished round; 0 when only the base is evaluated, -1 when nothing is."""
    return max(finished_numbers(campaign), default=-1)


def round_record(round_number: int, row: dict[str, Any]) -> RoundRecord:
    """A row of ``rounds`` as a record."""
    stages = ("sample", "judge", "derive", "train", "evaluate", "publish")
    low, high = row["eval_score_low"], row["eval_score_high"]
    score = ScoreSummary(
        mean=row["eval_score_mean"], low=-math.inf if low is None else low, high=math.inf if high is None else high
    )
    return RoundRecord(
        round=round_number,
        verdict=row.get("verdict"),
        findings=row.get("findings"),
        num_pairs=row["num_pairs"],
        num_ties=row["num_ties"],
        eval_scorer=row["eval_scorer"],
        score=score,
        checkpoint=row["checkpoint_out"],
        mlflow_run_id=row["mlflow_run_id"],
        stage_seconds={stage: row[f"{stage}_seconds"] for stage in stages},
        finished_at=row["finished_at"],
    )


def finished_rounds(campaign: Path) -> list[RoundRecord]:
    """All finished rounds of a campaign, in order."""
    return [
        round_record(n, read_rows(partition(campaign, "rounds", n) / "part.parquet")[0])
        for n in finished_numbers(campaign)
    ]


def campaign_named(name: str) -> CampaignConfig:
    """The saved configuration of a campaign.

    Args:
        name: the campaign's, or the path of its folder when it lies elsewhere than in the data folder (``runs_dir``).

    Raises:
        D3POError: there is none of that name; says which there are.
    """
    if os.sep in name:
        folder = absolute(name, Path.cwd(), "--campaign")
        problem = f"--campaign {name!r}: {folder} holds no campaign; expected a name, or a campaign's folder"
    else:
        folder = load_config({"campaign": name}, "--campaign").folder
        known = sorted(path.parent.name for path in folder.parent.glob(f"*/{CAMPAIGN_FILE}"))
        problem = (
            f"campaign {name!r} is not in {folder.parent}; there are {', '.join(known) or 'none'}; "
            "of one that lies elsewhere give the folder"
        )
    if not (folder / CAMPAIGN_FILE).exists() and not (folder / "stages").exists():
        raise D3POError(problem)
    return _lying_in(_saved_config(folder / CAMPAIGN_FILE), folder)


def _saved_config(path: Path) -> CampaignConfig:
    return load_config(_identity(path)["config"], str(path))


def _identity(path: Path) -> dict[str, Any]:
    found = read_sealed(path, CAMPAIGN_REMEDY)
    if not {"id", "config"} <= found.keys():
        raise D3POError(f"{path}: cannot be read (it lacks id or config); {CAMPAIGN_REMEDY}")
    return found


def round_config(campaign: Path, round_number: int) -> CampaignConfig:
    """The configuration that a round was begun with; its ``folder`` is where the campaign lies now.

    Raises:
        D3POError: it is missing or cannot be read.
    """
    path = stage_path(campaign, round_number, "config")
    require_record(campaign, round_number, "config")
    try:
        values = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise D3POError(
            f"{path}: cannot be read ({error}); restore it, the round cannot be made again without"
        ) from None
    return _lying_in(load_config(values, str(path)), campaign)


def rules_of(campaign: Path, round_number: int | None = None) -> CampaignConfig:
    """The configuration whose rules hold for a round: its own; the last round's for all rounds together.

    That of the campaign's start for one that was not begun.
    """
    if round_number is not None and stage_path(campaign, round_number, "config").exists():
        return round_config(campaign, round_number)
    numbers = [int(path.parent.name.removeprefix("round=")) for path in campaign.glob("stages/round=*/config.json")]
    if not numbers:
        return _lying_in(_saved_config(campaign / CAMPAIGN_FILE), campaign)
    return round_config(campaign, max(numbers))


def _lying_in(config: CampaignConfig, folder: Path) -> CampaignConfig:
    """The configuration of a campaign whose folder may have been moved or copied since it was saved."""
    usual = folder.parent.resolve() == data_folder() / "runs"
    return config.model_copy(update={"campaign": folder.name, "runs_dir": None if usual else str(folder.parent)})


def campaign_id(campaign: Path) -> str:
    """The identity of a campaign: a new one each time a campaign is started, also under an old name."""
    return str(_identity(campaign / CAMPAIGN_FILE)["id"])


def open_campaign(config: CampaignConfig) -> None:
    """Start the campaign, or make sure that the configuration still fits the one that is running.

    Raises:
        D3POError: a field changed that must stay as it was; the message names each with its old and new value.
    """
    path = config.folder / CAMPAIGN_FILE
    if path.exists():
        saved = _saved_config(path)
        # A server may move; what weights say of an image decides what the held-out scores mean.
        models = {f"scoring.models.{name}" for name in config.evaluation_scorers}
        changed = [
            c for c in changed_fields(saved, config)
            if c[0].startswith(FIXED_FIELDS) or (c[0] in models and not _moved_server(c))
        ]  # fmt: skip
        scorers = (list(saved.evaluation_scorers), list(config.evaluation_scorers))
        if scorers[0] != scorers[1] and not any(name == "evaluate.scorers" for name, *_ in changed):
            changed.append(("judge.scorers, which also evaluate,", *scorers))
        if changed:
            raise D3POError(f"campaign {config.campaign!r} was started with {_differences(changed)}; "
                            "set it back, or start another campaign (--campaign NAME)")  # fmt: skip
        return
    if (config.folder / "stages").exists():
        raise D3POError(f"{path}: is gone, and the campaign has begun; {CAMPAIGN_REMEDY} (--campaign NAME)")
    identity = {"id": uuid.uuid4().hex, "config": config.model_dump(mode="json")}
    with atomic_path(path) as temporary:
        temporary.write_text(sealed(identity))


def begin_round(config: CampaignConfig, round_number: int) -> None:
    """Freeze the round's configuration, or make sure that a round that was begun is finished with its own.

    Raises:
        D3POError: the round was begun with another configuration; the message names the fields.
    """
    path = stage_path(config.folder, round_number, "config")
    if path.exists():
        saved = round_config(config.folder, round_number)
        changed = [c for c in changed_fields(saved, config) if c[0] not in FREE_FIELDS and not _moved_server(c)]
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


def _moved_server(change: tuple[str, Any, Any]) -> bool:
    name, *places = change
    return name.startswith("scoring.models.") and all(is_url(place or "") for place in places)


def _differences(changed: list[tuple[str, Any, Any]]) -> str:
    return masked("; ".join(f"{name} = {old!r} (now {new!r})" for name, old, new in changed))


def rounds_to_do(campaign: Path, rounds: int, run_id: str) -> list[int]:
    """Numbers of the rounds that a run has to finish.

    What a run set out to do is kept on disk until it ends. The same run again (a retry) has the same goal, whatever it
    reached before; so has another run that asks for as many rounds as an interrupted one: the same command, given
    again, ends where the first would have ended.

    Args:
        campaign: the campaign's folder.
        rounds: how many rounds the run was asked for, at least 1.
        run_id: identity of the run, the same when it is retried.
    """
    done = last_finished_round(campaign)
    goals = _goals(campaign)
    # Of runs that asked for as many rounds and did not end; the last of them may have been killed after its last round.
    newest = next(reversed(goals), None)
    open_goals = [g for run, g in goals.items() if not g.get("over") and (g["last"] > done or run == newest)]
    before = next((g for g in reversed(open_goals) if g["rounds"] == rounds), None)
    goal = goals.get(run_id) or before or {"last": max(done, 0) + rounds, "rounds": rounds}
    _write_goals(campaign, goals | {run_id: goal})
    return list(range(done + 1, goal["last"] + 1))


def end_run(campaign: Path, run_id: str) -> None:
    """Note that a run did all that it set out to do: the same command again is a new one.

    Goals of other runs that are reached by now are over: no other run takes them up. They are kept, since a run that
    sleeps, and that this one overtook, has nothing left to do when it wakes.
    """
    done = last_finished_round(campaign)
    others = {run: goal for run, goal in _goals(campaign).items() if run != run_id}
    _write_goals(campaign, {run: g | {"over": 1} if g["last"] <= done else g for run, g in others.items()})


def has_goal(campaign: Path, run_id: str) -> bool:
    """Whether a run has not ended that set out to do something."""
    return run_id in _goals(campaign)


def _goals(campaign: Path) -> dict[str, dict[str, int]]:
    """By run: up to which round it goes, and how many rounds it was asked for."""
    path = campaign / TARGET_FILE
    content = json.loads(path.read_text()) if path.exists() else {"goals": {}}
    if "goals" not in content:  # as the first version wrote it: one goal
        reached = content["last"] <= last_finished_round(campaign)
        return {} if reached else {content["run_id"]: {key: content[key] for key in ("last", "rounds")}}
    return dict(content["goals"])


def _write_goals(campaign: Path, goals: dict[str, dict[str, int]]) -> None:
    with atomic_path(campaign / TARGET_FILE) as temporary:
        temporary.write_text(json.dumps({"goals": goals}))


@contextlib.contextmanager
def campaign_lock(campaign: Path, who: str) -> Iterator[None]:
    """Hold the campaign for this process; the kernel frees it when the process ends, however it ends.

    Raises:
        CampaignBusyError: another process holds it.
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


# What commands write that take no lock: imports, reports, pictures and comparisons of any round.
_UNLOCKED = (".*.tmp", "report/.*.tmp", "judgements/*/.*.tmp", "comparisons/.*.tmp", "comparisons/*/.*.tmp")


def sweep_leftovers(campaign: Path, round_number: int) -> None:
    """Remove the half-written files that a killed run or command left; the caller holds the campaign's lock.

    Args:
        campaign: the campaign's folder.
        round_number: the round in which the run wrote.
    """
    unlocked = {path for pattern in _UNLOCKED for path in campaign.glob(pattern)}
    locked = {
        path for pattern in (f"*/round={round_number}/.*.tmp", "checkpoints/.*.tmp") for path in campaign.glob(pattern)
    }
    for path in (locked - unlocked) | {path for path in unlocked if not _in_hands(path)}:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _in_hands(path: Path) -> bool:
    """Whether the process that writes a temporary file, whose name ends in its id, is another one and lives."""
    pid = path.name.removesuffix(".tmp").rpartition(".")[2]
    return pid.isdigit() and int(pid) != os.getpid() and psutil.pid_exists(int(pid))


def discard_round(campaign: Path) -> int | None:
    """Drop the files of the round that was begun and not finished; returns its number, None if there is none."""
    number = last_finished_round(campaign) + 1
    if not (campaign / "stages" / f"round={number}").exists():
        return None
    stages = campaign / "stages" / f"round={number}"
    # The round's configuration goes last: a discard that was interrupted is then finished by the next one.
    for path in stages.iterdir():
        if path.name != "config.json":
            path.unlink()
    for table in SCHEMAS:
        shutil.rmtree(partition(campaign, table, number), ignore_errors=True)
    for folder in ("images", "trajectories", "staging", "checkpoints"):
        for path in (campaign / folder).glob(f"*round={number}*"):
            if path.name in (f"round={number}", f".round={number}.tmp") or path.name.startswith(f"round={number}-"):
                shutil.rmtree(path)
    (campaign / TARGET_FILE).unlink(missing_ok=True)
    shutil.rmtree(stages)
    return number
