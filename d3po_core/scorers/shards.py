"""Score a shard's images while later shards are sampled."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from d3po_core.config import CampaignConfig, is_url
from d3po_core.devices import device_type
from d3po_core.sampling.job import Shard
from d3po_core.scorers.finding import BUILT_IN, MODELS, load_scorers
from d3po_core.store.files import atomic_path
from d3po_core.store.images import at_once, dissimilarity, load_pngs
from d3po_core.store.sealed import read_sealed, sealed


@dataclass(frozen=True)
class ShardScores:
    """The early scorers' results for a shard's images.

    Attributes:
        scores: scorer -> a score of every image.
        dissimilarities: a measure of how different each group's images look.
    """

    scores: dict[str, list[float]]
    dissimilarities: list[float]


def shard_scorers(config: CampaignConfig) -> list[str]:
    """Return the judge's scorers that can run while the model samples; they always score whole shards."""
    beside_gpu = device_type(config.model.device) == "cuda"
    return [
        name
        for name in dict.fromkeys(config.judge.scorers)
        if (beside_gpu if name in BUILT_IN else is_url(config.scoring.models.get(name, "")) or _has_gpu(name, config))
    ]


def _has_gpu(name: str, config: CampaignConfig) -> bool:
    return name in MODELS and config.scoring.gpus > 0


def score_shard(config: CampaignConfig, samples: list[dict[str, Any]]) -> ShardScores:
    """Score a shard with the early scorers.

    Args:
        config: the campaign's configuration.
        samples: the shard's rows of ``samples``, group after group.

    Raises:
        D3POError: a scorer failed.
    """
    images = load_pngs([config.folder / sample["image_path"] for sample in samples])
    prompts = [sample["prompt"] for sample in samples]
    scorers = load_scorers(config, shard_scorers(config))
    scores = {name: scorer(images, prompts).tolist() for name, scorer in scorers.items()}
    groups = images.reshape(-1, config.sample.group_size, *images.shape[1:])
    return ShardScores(scores, at_once(dissimilarity, groups))


def scores_path(shard: Shard) -> Path:
    """Return the path of a shard's early scores, beside its rows."""
    return shard.rows_path.with_suffix(".scores.json")


def write_scores(shard: Shard, found: ShardScores) -> None:
    """Write the early scorers' results for a shard."""
    with atomic_path(scores_path(shard)) as temporary:
        temporary.write_text(scores_text(found))


def scores_text(found: ShardScores) -> str:
    """Return the content of a shard's file of early scores."""
    return sealed(asdict(found))


def read_scores(shard: Shard, scorers: list[str]) -> ShardScores | None:
    """Return a shard's early scores, or None if the file does not hold exactly these scorers.

    Raises:
        D3POError: the file is damaged.
    """
    path = scores_path(shard)
    if not path.exists():
        return None
    found = ShardScores(**read_sealed(path, "remove it: the scorers are then asked again"))
    return found if found.scores.keys() == set(scorers) else None
