"""Guard: check a round before the next one builds on it."""

from pathlib import Path

import numpy as np
from prefect import get_run_logger, task

from d3po_core.config import CampaignConfig
from d3po_core.errors import D3POError
from d3po_core.evaluation.comparison import (
    Comparison,
    champions,
    compare_scores,
    fitted_champion,
    read_held_out,
    round_named,
)
from d3po_core.evaluation.guard import findings_of
from d3po_core.records import DeriveRecord, EvaluateRecord, GuardRecord, TrainRecord
from d3po_core.store.stages import finish_stage, read_record, stage_path, start_of
from tasks.stage import STAGE_OPTIONS
from tasks.tracking import delivery

VERDICTS = {"warn": "warned", "reject": "rejected", "stop": "stopped"}


@task(name="guard", **STAGE_OPTIONS)
def guard_round(config: CampaignConfig, round_number: int) -> GuardRecord:
    """Compare the round with the base, the previous round and the champion; decide where the next one starts."""
    record = finish_stage(config.folder, round_number, "guard", GuardRecord, lambda: _guard(config, round_number))
    if record.findings:
        get_run_logger().warning("round %d %s: %s", round_number, record.verdict, "; ".join(record.findings))
    delivery.deliver(config)
    return record


def require_trust(config: CampaignConfig, last_finished: int) -> None:
    """Refuse to continue a campaign that the guard stopped, until its configuration allows it.

    Raises:
        D3POError: the guard stopped the last round, and the policy is still to stop.
    """
    if config.guard.policy != "stop" or not stage_path(config.folder, last_finished, "guard").exists():
        return
    record = read_record(config.folder, last_finished, "guard", GuardRecord)
    if record.verdict == "stopped":
        raise D3POError(
            f"the guard stopped campaign {config.campaign!r} in round {last_finished} ({'; '.join(record.findings)}); "
            f"look at it with d3po compare, then go on from round {record.go_on_from} with guard.policy reject or warn"
        )


def _guard(config: CampaignConfig, round_number: int) -> GuardRecord:
    folder = config.folder
    if round_number == 0:
        return GuardRecord(verdict="ok", findings=[], go_on_from=0, champion=0, win_rates={})
    champion = round_named(folder, "champion")  # among earlier rounds: this one is not finished yet
    references = {"base": 0, "before": round_number - 1, "champion": champion}
    trusted = [number for number in range(round_number) if _trusted(folder, number)]
    numbers = [*sorted({*trusted, *references.values(), start_of(folder, round_number)}), round_number]
    held_out = read_held_out([(folder, number) for number in numbers])
    at = {number: row for row, number in enumerate(numbers)}
    scores_RI = held_out.scores[config.evaluation_scorers[0]]

    def against(reference_I: np.ndarray, scores_RI: np.ndarray = scores_RI) -> Comparison:
        return compare_scores(scores_RI[-1], reference_I, held_out.prompts)

    fitted_I = fitted_champion(scores_RI[[at[number] for number in trusted]], held_out.prompts)
    images_I = np.arange(len(held_out.prompts))
    findings = findings_of(
        config.guard,
        read_record(folder, round_number, "derive", DeriveRecord),
        read_record(folder, round_number, "train", TrainRecord),
        read_record(folder, round_number, "evaluate", EvaluateRecord),
        read_record(folder, 0, "evaluate", EvaluateRecord),
        {
            name: {
                "the round it started from": against(scores[at[start_of(folder, round_number)]], scores),
                "the champion": against(scores[[at[n] for n in trusted]][fitted_I, images_I], scores),
            }
            for name, scores in held_out.scores.items()
        },
    )
    verdict = VERDICTS[config.guard.policy] if findings else "ok"
    refused = verdict in ("rejected", "stopped")
    if not refused and champions(scores_RI[[at[champion], -1]], held_out.prompts)[-1] == 1:
        champion = round_number
    return GuardRecord(
        verdict=verdict,
        findings=findings,
        go_on_from=champion if refused else round_number,
        champion=champion,
        win_rates={name: against(scores_RI[at[number]]).win_rate for name, number in references.items()},
    )


def _trusted(folder: Path, round_number: int) -> bool:
    """Return whether the guard accepted a finished round's checkpoint; rounds older than the guard are trusted."""
    if not stage_path(folder, round_number, "guard").exists():
        return True
    return read_record(folder, round_number, "guard", GuardRecord).verdict not in ("rejected", "stopped")
