"""Begin and publish: the start and the end of a round."""

import subprocess
import time
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from prefect import get_run_logger, task

from d3po.tasks import mirroring
from d3po.tasks.reporting import catch_up, report_round
from d3po.tasks.showing import show_rounds
from d3po.tasks.stage import STAGE_OPTIONS
from d3po.tasks.tracking import delivery
from d3po_core.config import CampaignConfig
from d3po_core.datasets.checks import check_dataset
from d3po_core.devices import check_processes
from d3po_core.models.loading import check_model, storage_notes
from d3po_core.models.prompt_length import check_length
from d3po_core.models.space import check_space
from d3po_core.paths import running_clone
from d3po_core.planning.preflight import check_hub, check_sizes, check_texts
from d3po_core.records import (
    DeriveRecord,
    EvaluateRecord,
    GuardRecord,
    JudgeRecord,
    LabelRecord,
    RoundRecord,
    SampleRecord,
    TrainRecord,
)  # fmt: skip
from d3po_core.reproducing.frozen import freeze
from d3po_core.sampling.prompt_notes import prompt_notes, prompts_shown
from d3po_core.sampling.prompts import check_held_out, load_prompts
from d3po_core.scorers.finding import check_scoring_gpus, check_sizes_scored, load_scorers
from d3po_core.store.campaign import open_campaign
from d3po_core.store.goals import rounds_to_do
from d3po_core.store.integrity import record_files
from d3po_core.store.leftovers import sweep_leftovers
from d3po_core.store.stages import (
    checkpoint_path,
    last_finished_round,
    read_record,
    round_record,
    stage_path,
    start_of,
)
from d3po_core.store.tables import SCHEMAS, partition, read_rows, table_from_rows, write_table
from d3po_core.training.objectives import check_objective
from d3po_core.training.optimizer import check_beta, optimizer_class


def check_campaign(config: CampaignConfig) -> list[str]:
    """Check the campaign before anything is loaded or computed; return notes for the user.

    Raises:
        D3POError: one line that says what is wrong and what to do.
    """
    check_model(config.model)
    check_hub(config)
    check_sizes(config)
    check_texts(config)
    optimizer_class(config.train)
    check_objective(config)
    check_beta(config.train)
    check_processes(config)
    check_scoring_gpus(config)
    check_sizes_scored(config)
    training = load_prompts(config.sample.prompts, config.sample.prompt_column, "sample.prompts")
    held_out = load_prompts(config.evaluate.prompts, config.evaluate.prompt_column, "evaluate.prompts")
    check_held_out(training, held_out)
    check_dataset(config, held_out)
    load_scorers(config, (*config.judge.scorers, *config.evaluation_scorers))
    check_space(config)
    notes = [*storage_notes(config.model), *prompt_notes(training, "sample.prompts")]
    notes += prompt_notes(held_out, "evaluate.prompts")
    used, sample = [*training, *held_out[: config.evaluate.max_prompts]], config.sample
    return notes + check_length(config.model, used, sample.long_prompts, sample.negative_prompt)


def plan_rounds(config: CampaignConfig, rounds: int, run_id: str) -> list[int]:
    """Open the campaign and return the rounds that this run finishes; the caller holds the campaign's lock.

    Raises:
        D3POError: the configuration does not fit the campaign.
    """
    open_campaign(config)
    if config.sample.sampled_groups:
        training = load_prompts(config.sample.prompts, config.sample.prompt_column, "sample.prompts")
        get_run_logger().info("%s", prompts_shown(training, "sample.prompts"))
    for change in freeze(config, _held_out(config), _evaluated(config)):
        get_run_logger().warning("accepted: %s", change)
    numbers = rounds_to_do(config.folder, rounds, run_id)
    done = last_finished_round(config.folder)
    for number in {done, *numbers[:1]}:  # a kill may fall between a round's row and its delivery to MLflow
        sweep_leftovers(config.folder, number)
    if (partition(config.folder, "rounds", done) / "part.parquet").exists():
        note_published(config.folder, done)
    catch_up(config)  # a killed run left an older report
    mirroring.deliver(config)
    delivery.deliver(config)
    show_rounds(config)
    return numbers


def _held_out(config: CampaignConfig) -> list[str]:
    prompts = load_prompts(config.evaluate.prompts, config.evaluate.prompt_column, "evaluate.prompts")
    return prompts[: config.evaluate.max_prompts]


def _evaluated(config: CampaignConfig) -> list[str]:
    """The base's evaluation prompts, which a campaign of an earlier version must keep."""
    path = partition(config.folder, "evaluations", 0) / "part.parquet"
    return [row["prompt"] for row in read_rows(path)] if path.exists() else []


@task(name="publish", **STAGE_OPTIONS)
def publish_round(config: CampaignConfig, round_number: int) -> RoundRecord:
    """Write the round's row, which finishes the round, close its MLflow run, and tell Prefect."""
    path = partition(config.folder, "rounds", round_number) / "part.parquet"
    if not path.exists():
        write_table(config.folder, "rounds", round_number, table_from_rows("rounds", [_row(config, round_number)]))
    note_published(config.folder, round_number)
    report_round(config, round_number)
    mirroring.deliver(config)
    delivery.deliver(config)
    show_rounds(config)
    return round_record(round_number, read_rows(path)[0])


def note_published(campaign: Path, round_number: int) -> None:
    """Record the digest of a round's row, unless it is there; a kill may fall between the row and this."""
    if not stage_path(campaign, round_number, "publish").with_suffix(".files").exists():
        record_files(campaign, round_number, "publish")


def _row(config: CampaignConfig, round_number: int) -> dict[str, Any]:
    started = time.perf_counter()
    folder = config.folder
    record = partial(read_record, folder, round_number)  # every stage is finished when a round is published
    evaluated: EvaluateRecord = record("evaluate", EvaluateRecord)
    scorer = config.evaluation_scorers[0]
    row: dict[str, Any] = dict.fromkeys(field.name for field in SCHEMAS["rounds"] if field.nullable)
    row |= {"num_samples": 0, "num_pairs": 0, "num_ties": 0}
    row |= {f"{stage}_seconds": 0.0 for stage in ("sample", "judge", "derive", "train")}
    if round_number > 0:
        sampled: SampleRecord = record("sample", SampleRecord)
        judged: JudgeRecord = record("judge", JudgeRecord)
        derived: DeriveRecord = record("derive", DeriveRecord)
        trained: TrainRecord = record("train", TrainRecord)
        row |= {
            "num_samples": sampled.num_samples, "num_pairs": derived.num_pairs, "num_ties": derived.num_ties,
            "loss_mean": trained.loss, "clip_fraction": trained.clip_fraction, "lora_sha256": trained.lora_sha256,
            "pair_accuracy_before": trained.pair_accuracy_before, "pair_accuracy_after": trained.pair_accuracy_after,
            "margin_after": trained.margin_after, "kl_after": trained.kl_after, "drowned": trained.drowned,
            "winner_error_after": trained.winner_error_after, "loser_error_after": trained.loser_error_after,
            "gradient_factor": trained.gradient_factor,
            "sample_seconds": sampled.seconds, "judge_seconds": judged.seconds, "derive_seconds": derived.seconds,
            "train_seconds": trained.seconds,
        }  # fmt: skip
        if stage_path(folder, round_number, "label").exists():
            labelled: LabelRecord = record("label", LabelRecord)
            row["label_seconds"] = labelled.waited_seconds
    guarded: GuardRecord = record("guard", GuardRecord)
    for name, rate in guarded.win_rates.items():
        low, high = rate.ends
        row |= {f"win_rate_{name}": rate.mean, f"win_rate_{name}_low": low, f"win_rate_{name}_high": high}
    return row | {
        "diversity": evaluated.diversity,
        "drift": evaluated.drift,
        "champion": guarded.champion,
        "verdict": guarded.verdict,
        "findings": "; ".join(guarded.findings) or None,
        "checkpoint_in": checkpoint_path(start_of(folder, round_number) if round_number else 0),
        "checkpoint_out": checkpoint_path(round_number),
        "eval_scorer": scorer,
        "eval_score_mean": evaluated.scores[scorer].mean,
        "eval_score_low": evaluated.scores[scorer].ends[0],
        "eval_score_high": evaluated.scores[scorer].ends[1],
        "evaluate_seconds": evaluated.seconds,
        "mlflow_run_id": delivery.known_run_id(config, round_number),
        "config_sha256": config.sha256(),
        "git_commit": _git_commit(),
        "publish_seconds": time.perf_counter() - started,
        "finished_at": datetime.now(UTC),
    }


def _git_commit() -> str | None:
    if not (clone := running_clone()):  # an installed package may lie in another project's clone
        return None
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=clone, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
