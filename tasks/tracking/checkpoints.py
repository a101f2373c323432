"""Send MLflow a finished round's checkpoint: a model with its held-out metrics, a version, aliases, the report."""

import hashlib
import tempfile
from pathlib import Path
from shutil import copyfile, copytree
from typing import Any

from d3po.tasks.tracking.registry import log_checkpoint, register_version, set_aliases
from d3po.tasks.tracking.store import Client, campaign_label, campaign_run_id, log_digests, log_report, milliseconds
from d3po.tasks.tracking.wording import model_name
from d3po_core.config import CampaignConfig
from d3po_core.models.weights import LORA_FILE, weights_file
from d3po_core.records import EvaluateRecord, GuardRecord
from d3po_core.report.write import REPORT_FILE
from d3po_core.store.stages import read_record, round_record, stage_path, start_of
from d3po_core.store.tables import partition, read_rows

ALIASES = ("champion", "current", "previous")
TABLES = ("samples", "judgements", "preferences", "evaluations")


def held_out(record: EvaluateRecord) -> dict[str, float | None]:
    """Held-out means by name; the slashes group MLflow's charts."""
    means: dict[str, float | None] = {f"held_out/{scorer}": score.mean for scorer, score in record.scores.items()}
    return means | {"held_out/sanity/diversity": record.diversity, "held_out/sanity/drift_from_base": record.drift}


def win_rates(record: GuardRecord) -> dict[str, float | None]:
    """Win rates by name of the reference."""
    return {f"held_out/win_rate/{name}": rate.mean for name, rate in record.win_rates.items()}


def log_publish(client: Client, config: CampaignConfig, round_number: int, run_id: str) -> None:
    """Close a round's run and the campaign's, with the report; publish the round's checkpoint."""
    row = read_rows(partition(config.folder, "rounds", round_number) / "part.parquet")[0]
    log_digests(client, run_id, _digests(config, round_number, row))
    guarded = stage_path(config.folder, round_number, "guard").exists()  # else the round is older than the guard
    guard = read_record(config.folder, round_number, "guard", GuardRecord) if guarded else None
    if round_number == 0:
        set_aliases(client, config, dict.fromkeys(ALIASES, 0))  # clear those of a former campaign with the same name
    elif guard:
        _publish_model(client, config, round_number, run_id, guard, row)
    client.set_terminated(run_id, "FINISHED", milliseconds(row["finished_at"]))
    report = config.folder / REPORT_FILE
    if report.exists():
        log_report(client, config, report)
    client.set_terminated(campaign_run_id(config), "FINISHED", milliseconds(row["finished_at"]))


def _digests(config: CampaignConfig, round_number: int, row: dict[str, Any]) -> dict[str, Any]:
    files = {
        f"{table}/{file.stem}": hashlib.sha256(file.read_bytes()).hexdigest()
        for table in TABLES
        for file in sorted(partition(config.folder, table, round_number).glob("*.parquet"))
    }
    return {name: row[name] for name in ("git_commit", "config_sha256", "lora_sha256")} | {"files_sha256": files}


def _publish_model(
    client: Client, config: CampaignConfig, round_number: int, run_id: str, guard: GuardRecord, row: dict[str, Any]
) -> None:
    evaluated = read_record(config.folder, round_number, "evaluate", EvaluateRecord)
    record, metrics = round_record(round_number, row), held_out(evaluated) | win_rates(guard)
    tags = {"score": f"{record.score.mean:.3f}", "round": str(round_number), "guard": guard.verdict}
    name = model_name(record, campaign_label(client, config))
    file = weights_file(config.folder / row["checkpoint_out"])
    with tempfile.TemporaryDirectory() as folder:
        if file.name == LORA_FILE:
            copyfile(file, Path(folder) / LORA_FILE)
        else:
            copytree(file.parent, Path(folder) / file.parent.name, copy_function=copyfile)
        model = log_checkpoint(
            client, config, round_number, run_id, name, Path(folder), tags, metrics, row["finished_at"]
        )
    register_version(client, config, model, tags)
    aliases = {"champion": guard.champion}
    if guard.go_on_from == round_number:  # keep and mark a rejected checkpoint, but point no alias to it
        # Not `latest`: MLflow reserves it for the newest version, rejected or not.
        aliases |= {"current": round_number, "previous": start_of(config.folder, round_number)}
    set_aliases(client, config, aliases)
