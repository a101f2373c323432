"""Score finished shards on scorers' own GPUs, while others are sampled."""

from collections.abc import Iterable, Iterator

import pyarrow.parquet as pq

from d3po_core.config import CampaignConfig
from d3po_core.processes.job import Made, QueueJob
from d3po_core.processes.parcel import keep_files
from d3po_core.sampling.job import Shard, round_shards
from d3po_core.scorers.shards import read_scores, score_shard, scores_path, scores_text, shard_scorers


def _unscored(config: CampaignConfig, round_number: int) -> list[Shard]:
    scorers = shard_scorers(config)
    finished = [shard for shard in round_shards(config, round_number) if shard.rows_path.exists()]
    return [shard for shard in finished if read_scores(shard, scorers) is None]


def _needs(config: CampaignConfig, round_number: int) -> list[str]:
    """Return the paths of the shards' rows and images."""
    paths = []
    for shard in _unscored(config, round_number):
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


SCORE_SHARDS = QueueJob(
    name="d3po_core.scorers.job:SCORE_SHARDS",
    items=lambda config, round_number: [shard.index for shard in _unscored(config, round_number)],
    needs=_needs,
    inputs=("sample.prompts",),
    make=_make,
    keep=keep_files,
    finish=lambda results: None,
)
"""Score the round's finished shards that have no early scores yet; the units are scores."""
