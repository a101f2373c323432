"""Score finished shards on scorers' own GPUs, while others are sampled."""

from collections.abc import Iterable, Iterator

import pyarrow.parquet as pq

from d3po_core.config import CampaignConfig
from d3po_core.processes.job import Made, QueueJob
from d3po_core.processes.parcel import keep_files
from d3po_core.sampling.job import Shard, round_shards
from d3po_core.scorers.shards import score_shard, scores_path, scores_text


def _needs(config: CampaignConfig, shards: list[Shard]) -> list[str]:
    """Return the paths of the shards' rows and images."""
    paths = []
    for shard in shards:
        paths.append(shard.rows_path.relative_to(config.folder).as_posix())
        paths += pq.ParquetFile(shard.rows_path).read(["image_path"])["image_path"].to_pylist()
    return paths


def _make(config: CampaignConfig, round_number: int, items: Iterable[int | None]) -> Iterator[Made]:
    shards = round_shards(config, round_number)
    for item in items:
        if item is not None:
            found = score_shard(config, pq.ParquetFile(shards[item].rows_path).read().to_pylist())
            path = scores_path(shards[item]).relative_to(config.folder).as_posix()
            units = sum(map(len, found.scores.values()))
            yield Made(item, units, {path: scores_text(found).encode()})


def score_job(shards: list[Shard]) -> QueueJob:
    """Return the job that scores these finished shards of a round with the early scorers; the units are scores.

    Every scorer gets all their images, so keep them few.
    """
    return QueueJob(
        name="d3po_core.scorers.job:SCORE_SHARDS",
        items=lambda config, round_number: [shard.index for shard in shards],
        needs=lambda config, round_number: _needs(config, shards),
        inputs=("sample.prompts",),
        make=_make,
        keep=keep_files,
        finish=lambda results: None,
    )


# What workers import.
SCORE_SHARDS = score_job([])
