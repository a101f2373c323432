"""Judge and derive: score every image, measure how much each group differs, then derive preferences by SQL."""

from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from prefect import task

from d3po.tasks import mirroring
from d3po.tasks.scoring import score_round, scored_early
from d3po.tasks.stage import STAGE_OPTIONS, progress
from d3po.tasks.tracking import delivery
from d3po_core.config import CampaignConfig
from d3po_core.datasets.rounds import imported_judgements
from d3po_core.image_ids import IMPORTED_JUDGEMENTS, is_imported
from d3po_core.people.raters import earlier_gold, people_votes
from d3po_core.preferences.deciding import decide
from d3po_core.preferences.deriving import derive_preferences
from d3po_core.preferences.gold import gold_scores, left_out
from d3po_core.preferences.rewarding import image_labels
from d3po_core.records import DeriveRecord, JudgeRecord, LabelRecord
from d3po_core.sampling.job import round_shards
from d3po_core.store.images import dissimilarity, load_pngs
from d3po_core.store.stages import finish_stage, read_record
from d3po_core.store.tables import connect, partition, table_from_rows, write_table


@task(name="judge", **STAGE_OPTIONS)
def judge_images(config: CampaignConfig, round_number: int) -> JudgeRecord:
    """Score every image of the round with the configured proxy scorers."""
    record = finish_stage(config.folder, round_number, "judge", JudgeRecord, lambda: _judge(config, round_number))
    mirroring.deliver(config)
    delivery.deliver(config)
    return record


@task(name="derive", **STAGE_OPTIONS)
def derive_pairs(config: CampaignConfig, round_number: int) -> DeriveRecord:
    """Turn the round's judgements into preferences."""
    record = finish_stage(config.folder, round_number, "derive", DeriveRecord, lambda: _derive(config, round_number))
    mirroring.deliver(config)
    delivery.deliver(config)
    return record


def _judge(config: CampaignConfig, round_number: int) -> JudgeRecord:
    images = pq.ParquetFile(partition(config.folder, "samples", round_number) / "part.parquet").read().to_pylist()
    samples = [image for image in images if not is_imported(image["trajectory_path"])]
    total = len(samples) * len(set(config.judge.scorers))
    shards = round_shards(config, round_number)
    early = scored_early(config, shards)
    done = sum(len(values) for shard in early.values() for values in shard.scores.values())
    with progress(config, round_number, "judge", total, "score", done) as bar:
        scores, dissimilarities = score_round(config, shards, samples, early, bar.update)
    groups = [
        {"group_id": sample["group_id"], "dissimilarity": dissimilarity}
        for sample, dissimilarity in zip(samples[:: config.sample.group_size], dissimilarities, strict=True)
    ]
    groups += _imported_groups(config, [image for image in images if is_imported(image["trajectory_path"])])
    now = datetime.now(UTC)
    rows = [
        {
            "rater": name, "rater_kind": "proxy", "kind": "score", "sample_id": sample["sample_id"], "other_id": None,
            "value": score, "judged_at": now, "source": "proxy", "seconds": None, "position": None,
        }
        for name in scores
        for sample, score in zip(samples, scores[name], strict=True)
    ]  # fmt: skip
    write_table(config.folder, "judgements", round_number, table_from_rows("judgements", rows), name="proxy")
    if said := imported_judgements(config, round_number, now):
        write_table(config.folder, "judgements", round_number, table_from_rows("judgements", said), IMPORTED_JUDGEMENTS)
    write_table(config.folder, "groups", round_number, table_from_rows("groups", groups))
    means = {name: float(np.mean(values)) for name, values in scores.items() if values}
    return JudgeRecord(num_judgements=len(rows), mean_scores=means)


def _imported_groups(config: CampaignConfig, images: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of ``groups`` for images of a data set; a single image differs from nothing."""
    paths: dict[str, list[Path]] = {}
    for image in images:
        paths.setdefault(image["group_id"], []).append(config.folder / image["image_path"])
    return [
        {"group_id": group, "dissimilarity": dissimilarity(load_pngs(files)) if len(files) > 1 else 0.0}
        for group, files in paths.items()
    ]


def _proxies_decide(config: CampaignConfig, round_number: int) -> bool:
    """Return whether proxies decide the groups that no person judged.

    With labeller 'human' they do so only if the deadline said so.
    """
    if config.judge.labeller != "human":
        return True
    return read_record(config.folder, round_number, "label", LabelRecord).ended == "proxy"


def _judged_by_people(config: CampaignConfig, round_number: int) -> set[int]:
    """Return this round and those whose gold questions people answered: only they tell what a person's vote counts."""
    files = config.folder.glob("judgements/round=*/*.parquet")
    return {round_number} | {int(p.parent.name.removeprefix("round=")) for p in files if p.name != "proxy.parquet"}


def _derive(config: CampaignConfig, round_number: int) -> DeriveRecord:
    judge = config.judge
    with connect(config.folder, ("judgements", "samples"), _judged_by_people(config, round_number)) as connection:
        earlier, floor = earlier_gold(connection, round_number), judge.people.accuracy_floor
        decide_people = partial(
            decide, combine=judge.people.combine, accuracy_floor=floor, earlier_gold=earlier
        )  # fmt: skip
        proxies = _proxies_decide(config, round_number)
        derived = derive_preferences(
            connection, round_number, judge.combine, judge.pairs, decide_people, proxies, judge.scorer_weights
        )  # fmt: skip
        unheard = left_out(gold_scores(people_votes(connection, last_round=round_number)), floor)
        labels = image_labels(
            connection, round_number, derived.table, judge.rewards, proxies, judge.scorer_weights, unheard
        )  # fmt: skip
    write_table(config.folder, "preferences", round_number, derived.table)
    write_table(config.folder, "image_labels", round_number, table_from_rows("image_labels", labels))
    agreement = derived.table["agreement"].to_numpy()
    return DeriveRecord(
        num_pairs=len(derived.table),
        num_ties=derived.num_ties,
        mean_agreement=float(agreement.mean()) if len(agreement) else None,
    )
