"""Guard: check a round before the next one builds on it."""

from prefect import get_run_logger, task

from d3po.tasks import mirroring
from d3po.tasks.stage import STAGE_OPTIONS
from d3po.tasks.tracking import delivery
from d3po_core.config import CampaignConfig
from d3po_core.errors import D3POError
from d3po_core.evaluation.guard import judge_checkpoint
from d3po_core.records import GuardRecord
from d3po_core.store.stages import finish_stage, read_record, stage_path


@task(name="guard", **STAGE_OPTIONS)
def guard_round(config: CampaignConfig, round_number: int) -> GuardRecord:
    """Compare the round with the base, the previous round and the champion; decide where the next one starts."""
    record = finish_stage(
        config.folder, round_number, "guard", GuardRecord, lambda: judge_checkpoint(config, round_number)
    )
    if record.findings:
        get_run_logger().warning("round %d %s: %s", round_number, record.verdict, "; ".join(record.findings))
    mirroring.deliver(config)
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
