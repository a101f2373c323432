"""Finished stages and rounds: a stage's record exists exactly when its output is whole."""

import contextlib
import math
import os
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from d3po_core.errors import D3POError
from d3po_core.records import GuardRecord, Record, RoundRecord, ScoreSummary
from d3po_core.store.at_hand import bring_tables
from d3po_core.store.files import atomic_path, disk_errors
from d3po_core.store.integrity import record_files, require_record, was_finished
from d3po_core.store.tables import partition, read_rows

StageRecord = TypeVar("StageRecord", bound=Record)


def checkpoint_path(round_number: int) -> str | None:
    """Return a round's checkpoint folder, relative to the campaign; None for round 0, the base model."""
    return f"checkpoints/round={round_number}" if round_number else None


def stage_path(campaign: Path, round_number: int, stage: str) -> Path:
    """Return the path of a stage's record, which exists exactly when the stage's output is whole."""
    return campaign / "stages" / f"round={round_number}" / f"{stage}.json"


def finish_stage(
    campaign: Path, round_number: int, stage: str, kind: type[StageRecord], work: Callable[[], StageRecord]
) -> StageRecord:
    """Do a stage's work once; if the stage is finished, only return its record.

    Wherever the work is killed, doing it again must leave the same files. The record's ``seconds`` cover all attempts.

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
    """Return the seconds that earlier attempts at a stage have noted; 0 if there were none."""
    try:
        return float(_seconds_path(campaign, round_number, stage).read_text())
    except (OSError, ValueError):  # no attempt yet, or its last note was cut off
        return 0.0


def note_seconds(campaign: Path, round_number: int, stage: str, seconds: float) -> None:
    """Note the seconds of all attempts at a stage so far, for an attempt that may have to resume here."""
    with contextlib.suppress(OSError):  # the work itself reports a full disk
        path = _seconds_path(campaign, round_number, stage)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{seconds:.3f}")


def read_record(campaign: Path, round_number: int, stage: str, kind: type[StageRecord]) -> StageRecord:
    """Return the record of a finished stage.

    Raises:
        D3POError: the record is gone or damaged.
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
    """Return the round whose checkpoint a round starts from: the one before, unless the guard chose another."""
    before = round_number - 1
    if not was_finished(campaign, before, "guard"):
        return before
    return read_record(campaign, before, "guard", GuardRecord).go_on_from


def policy_files(campaign: Path, round_number: int, start: int) -> list[str]:
    """Return the files with which a worker has a round's policy, by path in the campaign; folders stand for all.

    Args:
        campaign: the campaign's folder.
        round_number: the round, whose predecessor's guard says where it starts.
        start: the round whose checkpoint is loaded.
    """
    guard = stage_path(campaign, round_number - 1, "guard").relative_to(campaign).as_posix()
    return [guard, "memory.json", *filter(None, [checkpoint_path(start)])]


def finished_numbers(campaign: Path) -> list[int]:
    """Return the numbers of the finished rounds, in order: those with a row in ``rounds``; 0 is the base."""
    # Count a round whose listed row is gone, so that its reader gets an error.
    stages = f"{campaign}/stages"
    noted = {name for name in _round_folders(campaign / "stages") if os.path.exists(f"{stages}/{name}/publish.files")}
    others = {*_round_folders(campaign / "rounds")} - noted
    rows = {name for name in others if _has_table(f"{campaign}/rounds/{name}")}
    return sorted(int(name.removeprefix("round=")) for name in rows | noted)


def begun_numbers(campaign: Path) -> list[int]:
    """Return the numbers of the rounds that have a stage or a row in ``rounds``, in order."""
    found = {*_round_folders(campaign / "stages"), *_round_folders(campaign / "rounds")}
    return sorted(int(name.removeprefix("round=")) for name in found)


def _round_folders(table: Path) -> list[str]:
    return [name for name in os.listdir(table) if name.startswith("round=")] if table.is_dir() else []


def _has_table(folder: str) -> bool:
    # Without pathlib, whose globs take ten times as long: a long campaign has a thousand folders, listed all the time.
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # an unfinished round may be dropped
        return any(name.endswith(".parquet") for name in os.listdir(folder))
    return False


def last_finished_round(campaign: Path) -> int:
    """Return the number of the last finished round; 0 if only the base is evaluated, -1 if nothing is."""
    return max(finished_numbers(campaign), default=-1)


def round_record(round_number: int, row: dict[str, Any]) -> RoundRecord:
    """Return a row of ``rounds`` as a record."""
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


def finished_rounds(campaign: Path, numbers: list[int] | None = None) -> list[RoundRecord]:
    """Return finished rounds of a campaign, in order; all when no numbers are given."""
    numbers = finished_numbers(campaign) if numbers is None else numbers
    bring_tables(campaign, ["rounds"], numbers)
    return [finished_round(campaign, number) for number in numbers]


def finished_round(campaign: Path, number: int) -> RoundRecord:
    """Return one finished round of a campaign."""
    return round_record(number, read_rows(partition(campaign, "rounds", number) / "part.parquet")[0])
