"""When the stages of a campaign's rounds ran, how fast, and how busy the GPU was: from the campaign's own files.

A stage's record says when it was finished and how long it took. What they do not say lies beside the campaigns: when a
process began, and what the GPU did. Both are appended to, so that nothing is lost with a run that is stopped.
"""

import json
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from gpu_usage import Usage, between, read_usage

from d3po_core.records import RoundRecord
from d3po_core.store.stages import finished_rounds, stage_path
from d3po_core.store.tables import partition, read_rows

STAGES = ("sample", "judge", "derive", "train", "evaluate", "guard", "publish")
STARTS_FILE, USAGE_FILE = "starts.csv", "gpu-usage.csv"

Results = dict[str, Any]


def note_start(data: Path, campaign: str) -> None:
    """Note that a process that advances the campaign begins now."""
    with (data / STARTS_FILE).open("a") as stream:
        stream.write(f"{campaign},{time.time():.3f}\n")


def _starts(data: Path, campaign: Path) -> list[float]:
    lines = [line.split(",") for line in (data / STARTS_FILE).read_text().splitlines()]
    return [float(at) for name, at in lines if name == campaign.name]


def all_round_times(data: Path, campaign: Path) -> list[Results]:
    """Times and rates of every finished round, the base's included."""
    records, starts, usage = finished_rounds(campaign), _starts(data, campaign), read_usage(data / USAGE_FILE)
    ends_before = [None, *(_timestamp(record.finished_at) for record in records)]
    return [
        round_times(campaign, record, starts, before, usage)
        for record, before in zip(records, ends_before, strict=False)
    ]


def round_times(
    campaign: Path, record: RoundRecord, starts: list[float], before: float | None, usage: list[Usage]
) -> Results:
    """Seconds and rates of a round; its wall time begins with the end of the round before, or with its process."""
    times = stretches(campaign, record)
    first, end = min(start for start, _ in times.values()), times["publish"][1]
    begun = max(at for at in (*starts, before) if at is not None and at <= first)
    seconds = {stage: stop - start for stage, (start, stop) in times.items()}
    busy = {stage: between(usage, *stretch) for stage, stretch in times.items()}
    return {
        "round": record.round, "first_of_its_process": begun != before, "wall_seconds": end - begun,
        "seconds": seconds, "between_stages_seconds": end - begun - sum(seconds.values()),
        "gpu": busy | {"round": between(usage, begun, end)}, "held_out": record.score.model_dump(),
        "ties": record.num_ties, "verdict": record.verdict, **_rates(campaign, record.round, seconds),
    }  # fmt: skip


def stretches(campaign: Path, record: RoundRecord) -> dict[str, tuple[float, float]]:
    """When each stage of a finished round began and ended, seconds since 1970; of its last attempt."""
    found = {}
    for stage in STAGES:
        path = stage_path(campaign, record.round, stage)
        if path.exists():
            stage_record = json.loads(path.read_text())
            end = _timestamp(datetime.fromisoformat(stage_record["finished_at"]))
            found[stage] = (end - stage_record["seconds"], end)
    end = _timestamp(record.finished_at)  # the round's row, which is written before the report
    return found | {"publish": (end - record.stage_seconds["publish"], end)}


def _timestamp(moment: datetime | None) -> float:
    assert moment is not None, "a finished stage says when it was finished"
    return moment.timestamp()


def _rates(campaign: Path, number: int, seconds: dict[str, float]) -> Results:
    """Images and pair-steps a second of whole stages, files included; and of the updates alone."""
    evaluated = json.loads(stage_path(campaign, number, "evaluate").read_text())["num_images"]
    rates: Results = {"evaluate images/s": evaluated / seconds["evaluate"]}
    if number == 0:
        return rates
    images = json.loads(stage_path(campaign, number, "sample").read_text())["num_samples"]
    rates |= {"images": images, "sample images/s": images / seconds["sample"]}
    updates, pair_steps = _updates(campaign, number)
    if not updates:  # all pairs were ties
        return rates
    done = sum(pair_steps)
    return rates | {
        "pairs": sum(row["num_pairs"] for row in updates), "pair_steps": done,
        "train pair-steps/s": done / seconds["train"],
        "updates pair-steps/s": done / sum(row["seconds"] for row in updates),
        "last update pair-steps/s": pair_steps[-1] / updates[-1]["seconds"],
    }  # fmt: skip


def _updates(campaign: Path, number: int) -> tuple[list[Results], list[int]]:
    """A round's updates, and how many pair-steps each trained."""
    updates = read_rows(partition(campaign, "updates", number) / "part.parquet")
    steps = len({row["step"] for row in read_rows(partition(campaign, "update_steps", number) / "part.parquet")})
    return updates, [row["num_pairs"] * steps for row in updates]


def start_times(data: Path, campaign: Path) -> dict[str, float]:
    """Seconds from the start of a campaign's first process to what somebody waits for."""
    base, first = (stretches(campaign, record) for record in finished_rounds(campaign)[:2])
    updates, _ = _updates(campaign, 1)
    moments = {
        "the first stage begins": base["evaluate"][0],
        "the base is evaluated": base["evaluate"][1],
        "the first sampling stage is finished": first["sample"][1],
        "training begins": first["train"][0],
        "the first update is made": min(_timestamp(row["finished_at"]) for row in updates),
        "round 1 is finished": first["publish"][1],
    }
    began = _starts(data, campaign)[0]
    return {name: moment - began for name, moment in moments.items()}
