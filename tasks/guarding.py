"""Guard: look at a round before the next one builds on it."""

from prefect import get_run_logger, task

from d3po_core.campaign import finish_stage, read_record, stage_path
from d3po_core.comparison import Comparison, champions, compare_scores, read_held_out, round_named
from d3po_core.config import CampaignConfig
from d3po_core.errors import D3POError
from d3po_core.guard import findings_of
from d3po_core.records import EvaluateRecord, GuardRecord, TrainRecord
from tasks import tracking
from tasks.stage import STAGE_OPTIONS

VERDICTS = {"warn": "warned", "reject": "rejected", "stop": "stopped"}


@task(name="guard", **STAGE_OPTIONS)
def guard_round(config: CampaignConfig, round_number: int) -> GuardRecord:
    """Compare the round with the base, the round before and the champion, and decide what the next one starts from."""
    record = finish_stage(config.folder, round_number, "guard", GuardRecord, lambda: _guard(config, round_number))
    if record.findings:
        get_run_logger().warning("round %d %s: %s", round_number, record.verdict, "; ".join(record.findings))
    tracking.deliver(config)
    return record


def require_trust(config: CampaignConfig, last_finished: int) -> None:
    """Refuse to go on with a campaign that the guard stopped, until its configuration says otherwise.

    Raises:
        D3POError: the last round was stopped and the policy is still to stop.
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
    if round_number == 0:
        return GuardRecord(verdict="ok", findings=[], go_on_from=0, champion=0, win_rates={})
    champion = round_named(config.folder, "champion")  # of the rounds before: this one is not finished yet
    references = {"base": 0, "before": round_number - 1, "champion": champion}
    numbers = list(dict.fromkeys([*references.values(), round_number]))
    held_out = read_held_out([(config.folder, number) for number in numbers])
    scorer = config.evaluation_scorers[0]

    def against(number: int, name: str = scorer) -> Comparison:
        scores = held_out.scores[name]
        return compare_scores(scores[-1], scores[numbers.index(number)], held_out.prompts)

    findings = findings_of(
        config.guard,
        read_record(config.folder, round_number, "train", TrainRecord),
        read_record(config.folder, round_number, "evaluate", EvaluateRecord),
        read_record(config.folder, 0, "evaluate", EvaluateRecord),
        {name: against(champion, name) for name in held_out.scores},
    )
    verdict = VERDICTS[config.guard.policy] if findings else "ok"
    refused = verdict in ("rejected", "stopped")
    rows = held_out.scores[scorer][[numbers.index(champion), -1]]
    if not refused and champions(rows, held_out.prompts)[-1] == 1:
        champion = round_number
    return GuardRecord(
        verdict=verdict,
        findings=findings,
        go_on_from=champion if refused else round_number,
        champion=champion,
        win_rates={name: against(number).win_rate for name, number in references.items()},
    )
