"""Send each stage's results to MLflow, read from what it left on disk."""

import statistics
import tempfile
from collections.abc import Callable
from shutil import copyfile

from d3po.tasks.tracking.checkpoints import held_out, log_publish, win_rates
from d3po.tasks.tracking.registry import log_to_model
from d3po.tasks.tracking.store import Client, log_both, log_grid_once, log_lineage, log_metrics
from d3po_core.config import CampaignConfig
from d3po_core.models.weights import LORA_FILE, weights_file
from d3po_core.people.human_win_rate import HumanWinRate
from d3po_core.people.raters import round_metrics
from d3po_core.records import (
    DeriveRecord,
    EvaluateRecord,
    GuardRecord,
    JudgeRecord,
    LabelRecord,
    SampleRecord,
    TrainRecord,
)
from d3po_core.store.stages import read_record, stage_path
from d3po_core.store.tables import connect, partition, read_rows

# Values of the policy before each update, and after the round's last update.
BEFORE = ("margin_before", "pair_accuracy_before", "kl_before")
AFTER = ("margin_after", "pair_accuracy_after", "kl_after", "winner_error_after", "loser_error_after")
APART = ("winner_error_before", "loser_error_before", "gradient_factor")


def _log_sample(client: Client, config: CampaignConfig, round_number: int, run_id: str) -> None:
    record = read_record(config.folder, round_number, "sample", SampleRecord)
    own = {"sample/images": record.num_samples, "sample/images_per_second": record.num_samples / record.seconds}
    log_both(client, config, round_number, run_id, record.finished_at, {"seconds/sample": record.seconds}, own)
    client.log_artifact(run_id, str(config.folder / record.contact_sheet))
    client.log_artifact(run_id, str(stage_path(config.folder, round_number, "config")))
    log_lineage(client, config, round_number, run_id, "samples")


def _log_judge(client: Client, config: CampaignConfig, round_number: int, run_id: str) -> None:
    record = read_record(config.folder, round_number, "judge", JudgeRecord)
    curves = {f"judge/{scorer}": mean for scorer, mean in record.mean_scores.items()}
    log_both(client, config, round_number, run_id, record.finished_at, curves, {"seconds/judge": record.seconds})
    log_lineage(client, config, round_number, run_id, "judgements")


def _log_label(client: Client, config: CampaignConfig, round_number: int, run_id: str) -> None:
    record = read_record(config.folder, round_number, "label", LabelRecord)
    curves: dict[str, float | None] = {"seconds/waited_for_people": record.waited_seconds}
    with connect(config.folder) as connection:
        curves |= round_metrics(connection, round_number, config.judge.people.accuracy_floor)
    own: dict[str, float | None] = {
        "label/groups": record.groups_done, "label/judgements": record.num_judgements,
        "label/raters": record.num_raters,
    }  # fmt: skip
    log_both(client, config, round_number, run_id, record.finished_at, curves, own)
    client.set_tag(run_id, "d3po.label_ended", record.ended)
    log_lineage(client, config, round_number, run_id, "judgements")


def _log_derive(client: Client, config: CampaignConfig, round_number: int, run_id: str) -> None:
    record = read_record(config.folder, round_number, "derive", DeriveRecord)
    pairs: dict[str, float | None] = {"pairs/kept": record.num_pairs, "pairs/ties": record.num_ties}
    own: dict[str, float | None] = {"seconds/derive": record.seconds}
    if record.mean_agreement != 1:  # a single scorer always agrees with itself
        pairs["pairs/agreement"] = record.mean_agreement
    # Without ties, every round keeps as many pairs.
    curves, own = (pairs, own) if record.num_ties else ({}, pairs | own)
    log_both(client, config, round_number, run_id, record.finished_at, curves, own)
    log_lineage(client, config, round_number, run_id, "preferences")


def _log_train(client: Client, config: CampaignConfig, round_number: int, run_id: str) -> None:
    record = read_record(config.folder, round_number, "train", TrainRecord)
    updates = read_rows(partition(config.folder, "updates", round_number) / "part.parquet")
    steps = read_rows(partition(config.folder, "update_steps", round_number) / "part.parquet")
    columns = ("loss", *BEFORE, *APART, "clip_fraction", "grad_norm", "drowned", "seconds")
    last = record.finished_at
    # Rounds of an older version lack some columns, and objectives without pairs have no margin.
    rows = [
        (f"update/{name}", row[name], row["update"], row["finished_at"])
        for row in updates for name in columns if row.get(name) is not None
    ]  # fmt: skip
    rows += [
        (
            f"timestep/{name}",
            statistics.fmean(row[name] for row in steps if row["timestep"] == timestep),
            timestep,
            last,
        )
        for timestep in sorted({row["timestep"] for row in steps})
        for name in (*BEFORE, *APART, "clip_fraction")
        if all(row.get(name) is not None for row in steps)
    ]
    log_metrics(client, run_id, rows)
    curves = {f"train/{name}": getattr(record, name) for name in ("loss", *BEFORE, *AFTER, "gradient_factor")}
    # Nearly always 0; the guard says when they are not.
    own = {f"train/{name}": getattr(record, name) for name in ("clip_fraction", "drowned")}
    pair_steps = sum(row["num_pairs"] for row in updates) * len({row["step"] for row in steps})
    own["train/pair_steps_per_second"] = pair_steps / record.seconds
    curves["seconds/train"] = record.seconds
    log_both(client, config, round_number, run_id, record.finished_at, curves, own)
    file = weights_file(config.folder / record.checkpoint)
    if file.name == LORA_FILE:  # a whole network is large, so it is sent only with the model
        with tempfile.TemporaryDirectory() as folder:
            client.log_artifact(run_id, copyfile(file, f"{folder}/{LORA_FILE}"))  # MLflow copies the mode too


def _log_evaluate(client: Client, config: CampaignConfig, round_number: int, run_id: str) -> None:
    record = read_record(config.folder, round_number, "evaluate", EvaluateRecord)
    curves = held_out(record) | {"seconds/evaluate": record.seconds}
    own: dict[str, float | None] = {}
    for scorer, score in record.scores.items():
        own[f"held_out/{scorer}_low"], own[f"held_out/{scorer}_high"] = score.ends
    log_both(client, config, round_number, run_id, record.finished_at, curves, own)
    client.log_artifact(run_id, str(config.folder / record.grid))
    log_grid_once(client, config, round_number, config.folder / record.grid)
    log_lineage(client, config, round_number, run_id, "evaluations")


def _log_guard(client: Client, config: CampaignConfig, round_number: int, run_id: str) -> None:
    record = read_record(config.folder, round_number, "guard", GuardRecord)
    own: dict[str, float | None] = {}
    for name, rate in record.win_rates.items():
        own[f"held_out/win_rate/{name}_low"], own[f"held_out/win_rate/{name}_high"] = rate.ends
    log_both(client, config, round_number, run_id, record.finished_at, win_rates(record), own)
    client.set_tag(run_id, "d3po.verdict", record.verdict)
    if record.findings:
        client.set_tag(run_id, "d3po.findings", "; ".join(record.findings))


def log_human_win_rate(client: Client, config: CampaignConfig, rate: HumanWinRate, run_id: str) -> None:
    """Log how often people prefer the round to a reference, in the round's run, the campaign's run and the model."""
    name = f"held_out/human_win_rate/{rate.reference.replace(' ', '_')}"
    curves: dict[str, float | None] = {name: rate.win_rate.mean}
    own: dict[str, float | None] = {
        f"{name}_low": rate.win_rate.low, f"{name}_high": rate.win_rate.high,
        f"{name}_judgements": rate.num_judgements,
    }  # fmt: skip
    log_both(client, config, rate.round, run_id, rate.last_at, curves, own)
    log_to_model(client, rate.round, run_id, curves, rate.last_at)
    log_lineage(client, config, rate.round, run_id, "comparisons")


LOGGERS: dict[str, Callable[[Client, CampaignConfig, int, str], None]] = {
    "sample": _log_sample,
    "judge": _log_judge,
    "label": _log_label,
    "derive": _log_derive,
    "train": _log_train,
    "evaluate": _log_evaluate,
    "guard": _log_guard,
    "publish": log_publish,
}
