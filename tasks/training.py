"""Train: turn the round's preferences into the next checkpoint."""

from prefect import get_run_logger, task

from d3po.tasks import mirroring
from d3po.tasks.stage import STAGE_OPTIONS, model_turn, progress
from d3po.tasks.tracking import delivery
from d3po_core.config import CampaignConfig
from d3po_core.processes.engine import run_job
from d3po_core.records import TrainRecord
from d3po_core.store.stages import checkpoint_path, finish_stage
from d3po_core.training.job import TRAIN, count_updates
from d3po_core.training.optimizer import drowned_warning


@task(name="train", **STAGE_OPTIONS)
def train_policy(config: CampaignConfig, round_number: int) -> TrainRecord:
    """Train the policy on the round's preferences and write the round's checkpoint."""
    record = finish_stage(config.folder, round_number, "train", TrainRecord, lambda: _train(config, round_number))
    warning = drowned_warning(record.drowned, config.train)
    if warning:
        get_run_logger().warning("round %d: %s", round_number, warning)
    mirroring.deliver(config)
    delivery.deliver(config)
    return record


def _train(config: CampaignConfig, round_number: int) -> TrainRecord:
    total, done = count_updates(config, round_number)
    with model_turn(config), progress(config, round_number, "train", total, "update", done) as bar:
        trained = run_job(TRAIN, config, round_number, bar.update)
    return TrainRecord(checkpoint=checkpoint_path(round_number), **trained)
