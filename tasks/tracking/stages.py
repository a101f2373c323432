"""Send each stage's results to MLflow, read from what it left on disk."""

import hashlib
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from shutil import copyfile, copytree
from typing import Any

from d3po.tasks.tracking.store import (
    Client,
    campaign_run_id,
    describe,
    describe_version,
    log_both,
    log_checkpoint,
    log_grid_once,
    log_lineage,
    log_metrics,
    log_report,
    log_to_model,
    milliseconds,
    register_version,
    registered_name,
    set_aliases,
    tracking_uri,
)
from d3po_core.config import CampaignConfig
from d3po_core.models.weights import LORA_FILE, loading_line, weights_file
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
from d3po_core.report.write import REPORT_FILE
from d3po_core.store.campaign import campaign_id
from d3po_core.store.stages import read_record, round_record, stage_path, start_of
from d3po_core.store.tables import connect, partition, read_rows
from d3po_core.urls import masked

# Values of the policy before each update, and after the round's last update.
BEFORE = ("margin_before", "pair_accuracy_before", "kl_before")
AFTER = ("margin_after", "pair_accuracy_after", "kl_after")


def _log_sample(client: Client, config: CampaignConfig, round_number: int, run_id: str) -> None:
    record = read_record(config.folder, round_number, "sample", SampleRecord)
    values = {"sample/images": record.num_samples, "sample/images_per_second": record.num_samples / record.seconds}
    log_both(client, config, round_number, run_id, record.finished_at, {**values, "seconds/sample": record.seconds})
    client.log_artifact(run_id, str(config.folder / record.contact_sheet))
    client.log_artifact(run_id, str(stage_path(config.folder, round_number, "config")))
    log_lineage(client, config, round_number, run_id, "samples")


def _log_judge(client: Client, config: CampaignConfig, round_number: int, run_id: str) -> None:
    record = read_record(config.folder, round_number, "judge", JudgeRecord)
    values = {f"judge/{scorer}": mean for scorer, mean in record.mean_scores.items()}
    log_both(client, config, round_number, run_id, record.finished_at, {**values, "seconds/judge": record.seconds})
    log_lineage(client, config, round_number, run_id, "judgements")


def _log_label(client: Client, config: CampaignConfig, round_number: int, run_id: str) -> None:
    record = read_record(config.folder, round_number, "label", LabelRecord)
    values: dict[str, float | None] = {
        "label/groups": record.groups_done,
        "label/judgements": record.num_judgements,
        "label/raters": record.num_raters,
        "seconds/waited_for_people": record.waited_seconds,
    }
    with connect(config.folder) as connection:
        values |= round_metrics(connection, round_number, config.judge.people.accuracy_floor)
    log_both(client, config, round_number, run_id, record.finished_at, values)
    client.set_tag(run_id, "d3po.label_ended", record.ended)
    log_lineage(client, config, round_number, run_id, "judgements")


def _log_derive(client: Client, config: CampaignConfig, round_number: int, run_id: str) -> None:
    record = read_record(config.folder, round_number, "derive", DeriveRecord)
    values = {
        "derive/pairs": record.num_pairs,
        "derive/ties": record.num_ties,
        "derive/agreement": record.mean_agreement,
        "seconds/derive": record.seconds,
    }
    log_both(client, config, round_number, run_id, record.finished_at, values)
    log_lineage(client, config, round_number, run_id, "preferences")


def _log_train(client: Client, config: CampaignConfig, round_number: int, run_id: str) -> None:
    record = read_record(config.folder, round_number, "train", TrainRecord)
    updates = read_rows(partition(config.folder, "updates", round_number) / "part.parquet")
    steps = read_rows(partition(config.folder, "update_steps", round_number) / "part.parquet")
    curves = ("loss", *BEFORE, "clip_fraction", "grad_norm", "drowned", "seconds")
    last = record.finished_at
    # Rounds of an older version lack some columns.
    rows = [
        (f"update/{name}", row[name], row["update"], row["finished_at"])
        for row in updates for name in curves if name in row
    ]  # fmt: skip
    rows += [
        (
            f"by_timestep/{name}",
            statistics.fmean(row[name] for row in steps if row["timestep"] == timestep),
            timestep,
            last,
        )
        for timestep in sorted({row["timestep"] for row in steps})
        for name in (*BEFORE, "clip_fraction")
        if all(name in row for row in steps)
    ]
    log_metrics(client, run_id, rows)
    values: dict[str, float | None] = {
        f"train/{name}": getattr(record, name) for name in ("loss", *BEFORE, *AFTER, "clip_fraction", "drowned")
    }
    pair_steps = sum(row["num_pairs"] for row in updates) * len({row["step"] for row in steps})
    values["train/pair_steps_per_second"] = pair_steps / record.seconds
    values["seconds/train"] = record.seconds
    log_both(client, config, round_number, run_id, record.finished_at, values)
    file = weights_file(config.folder / record.checkpoint)
    if file.name == LORA_FILE:  # a whole network is large, so it is sent only with the model
        with tempfile.TemporaryDirectory() as folder:
            client.log_artifact(run_id, copyfile(file, f"{folder}/{LORA_FILE}"))  # MLflow copies the mode too
    client.set_tag(run_id, "d3po.lora_sha256", record.lora_sha256)


def _log_evaluate(client: Client, config: CampaignConfig, round_number: int, run_id: str) -> None:
    record = read_record(config.folder, round_number, "evaluate", EvaluateRecord)
    values = _held_out(record) | {"seconds/evaluate": record.seconds}
    for scorer, score in record.scores.items():
        values[f"held_out/{scorer}_low"], values[f"held_out/{scorer}_high"] = score.ends
    log_both(client, config, round_number, run_id, record.finished_at, values)
    client.log_artifact(run_id, str(config.folder / record.grid))
    log_grid_once(client, config, round_number, config.folder / record.grid)
    log_lineage(client, config, round_number, run_id, "evaluations")


def _log_guard(client: Client, config: CampaignConfig, round_number: int, run_id: str) -> None:
    record = read_record(config.folder, round_number, "guard", GuardRecord)
    values = _win_rates(record)
    for name, rate in record.win_rates.items():
        values[f"held_out/win_rate_{name}_low"], values[f"held_out/win_rate_{name}_high"] = rate.ends
    log_both(client, config, round_number, run_id, record.finished_at, values)
    client.set_tag(run_id, "d3po.verdict", record.verdict)
    if record.findings:
        client.set_tag(run_id, "d3po.findings", "; ".join(record.findings))


def _held_out(record: EvaluateRecord) -> dict[str, float | None]:
    means: dict[str, float | None] = {f"held_out/{scorer}": score.mean for scorer, score in record.scores.items()}
    return means | {"held_out/diversity": record.diversity, "held_out/drift_from_base": record.drift}


def _win_rates(record: GuardRecord) -> dict[str, float | None]:
    return {f"held_out/win_rate_{name}": rate.mean for name, rate in record.win_rates.items()}


def _log_publish(client: Client, config: CampaignConfig, round_number: int, run_id: str) -> None:
    row = read_rows(partition(config.folder, "rounds", round_number) / "part.parquet")[0]
    log_both(client, config, round_number, run_id, row["finished_at"], {"seconds/publish": row["publish_seconds"]})
    client.set_tag(run_id, "d3po.git_commit", row["git_commit"] or "unknown")
    client.set_tag(run_id, "d3po.config_sha256", row["config_sha256"])
    if round_number == 0:
        set_aliases(client, config, dict.fromkeys(ALIASES, 0))  # clear those of a former campaign with the same name
    elif stage_path(config.folder, round_number, "guard").exists():  # else the round is older than the guard
        _publish_model(client, config, round_number, run_id, row)
    client.set_terminated(run_id, "FINISHED", milliseconds(row["finished_at"]))
    report = config.folder / REPORT_FILE
    if report.exists():
        log_report(client, config, report)
    parent = campaign_run_id(config)
    describe(client, parent, _about_campaign(config, round_number))
    client.set_tag(parent, "d3po.last_finished_round", str(round_number))
    client.set_terminated(parent, "FINISHED", milliseconds(row["finished_at"]))


def _publish_model(client: Client, config: CampaignConfig, round_number: int, run_id: str, row: dict[str, Any]) -> None:
    """Log the checkpoint as a model with held-out metrics, and register a version with aliases and loading code."""
    guard = read_record(config.folder, round_number, "guard", GuardRecord)
    evaluated = read_record(config.folder, round_number, "evaluate", EvaluateRecord)
    preferences = partition(config.folder, "preferences", round_number) / "part.parquet"
    tags = {
        "d3po.campaign": config.campaign, "d3po.campaign_id": campaign_id(config.folder),
        "d3po.round": str(round_number), "d3po.verdict": guard.verdict,
        "d3po.git_commit": row["git_commit"] or "unknown",
        "d3po.config_sha256": row["config_sha256"], "d3po.lora_sha256": row["lora_sha256"],
        "d3po.preferences_sha256": hashlib.sha256(preferences.read_bytes()).hexdigest(),
    }  # fmt: skip
    metrics = _held_out(evaluated) | _win_rates(guard)
    checkpoint = config.folder / row["checkpoint_out"]
    file = weights_file(checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        if file.name == LORA_FILE:
            copyfile(file, Path(folder) / LORA_FILE)
        else:
            copytree(file.parent, Path(folder) / file.parent.name, copy_function=copyfile)
        model = log_checkpoint(client, config, round_number, run_id, Path(folder), tags, metrics, row["finished_at"])
    version = register_version(client, config, model, run_id, tags)
    text = _about_round(config, round_number, guard, row) + _loading_lines(config, checkpoint, version)
    describe_version(client, config, model, version, text)
    describe(client, run_id, text)
    aliases = {"champion": guard.champion}
    if guard.go_on_from == round_number:  # keep and mark a rejected checkpoint, but point no alias to it
        # Not `latest`: MLflow reserves it for the newest version, rejected or not.
        aliases |= {"current": round_number, "previous": start_of(config.folder, round_number)}
    set_aliases(client, config, aliases)


def _about_round(config: CampaignConfig, round_number: int, guard: GuardRecord, row: dict[str, Any]) -> str:
    score = round_record(round_number, row).score
    rates = ", ".join(f"{rate.mean:.2f} against {name}" for name, rate in guard.win_rates.items())
    findings = "".join(f"\n- {finding}" for finding in guard.findings)
    return (
        f"Round {round_number} of campaign `{config.campaign}`: held-out {row['eval_scorer']} {score}; wins {rates}; "
        f"{row['num_pairs']} pairs; guard: {guard.verdict}.\n{findings}\n"
    )


def _loading_lines(config: CampaignConfig, checkpoint: Path, version: str) -> str:
    return (
        f"\n```python\nmlflow.set_tracking_uri({masked(tracking_uri())!r})\n"
        f"pipe = diffusers.DiffusionPipeline.from_pretrained({config.model.path!r})\n"
        f'folder = mlflow.artifacts.download_artifacts("models:/{registered_name(config)}/{version}")\n'
        f"{loading_line(checkpoint, 'folder')}\n```\n"
    )


def _about_campaign(config: CampaignConfig, round_number: int) -> str:
    return (
        f"D3PO campaign `{config.campaign}`, {round_number} rounds, judged by "
        f"{config.judge.labeller}: {', '.join(config.judge.scorers)}. Each step is a round. Start with "
        "`held_out/*` (intervals `_low`, `_high`), the artifacts `report.html` and held-out images, and the model "
        f"`{registered_name(config)}` with its aliases champion, current and previous.\n"
    )


def log_human_win_rate(client: Client, config: CampaignConfig, rate: HumanWinRate, run_id: str) -> None:
    """Log how often people prefer the round to a reference, in the round's run, the campaign's run and the model."""
    name = f"held_out/human_win_rate_{rate.reference.replace(' ', '_')}"
    values: dict[str, float | None] = {
        name: rate.win_rate.mean, f"{name}_low": rate.win_rate.low, f"{name}_high": rate.win_rate.high,
        f"{name}_judgements": rate.num_judgements,
    }  # fmt: skip
    log_both(client, config, rate.round, run_id, rate.last_at, values)
    log_to_model(client, config, rate.round, run_id, {name: rate.win_rate.mean}, rate.last_at)
    log_lineage(client, config, rate.round, run_id, "comparisons")


ALIASES = ("champion", "current", "previous")

LOGGERS: dict[str, Callable[[Client, CampaignConfig, int, str], None]] = {
    "sample": _log_sample,
    "judge": _log_judge,
    "label": _log_label,
    "derive": _log_derive,
    "train": _log_train,
    "evaluate": _log_evaluate,
    "guard": _log_guard,
    "publish": _log_publish,
}
