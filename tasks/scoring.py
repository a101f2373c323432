"""Scores of a round's images; some are there before the stage judge: shards are scored while others are sampled.

Asked early are only scorers that take nothing from the sampling: servers, and beside a GPU the built-in proxies. A
learned scorer waits for its turn on the device, and a function of the user's may need the device as well. Early scores
are kept in memory alone: a run that was killed asks again about the same shards, and so comes to the same numbers.
"""

import contextlib
import contextvars
import itertools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from d3po_core.config import CampaignConfig
from d3po_core.devices import device_type
from d3po_core.errors import D3POError
from d3po_core.processes.job import Tell
from d3po_core.sampling.job import Shard, round_shards
from d3po_core.scorers.finding import load_scorers
from d3po_core.scorers.shards import ShardScores, score_shard, shard_scorers
from d3po_core.store.images import beside_a_gpu, load_pngs
from tasks.logs import run_logger
from tasks.stage import scoring_turn

LOOK_EVERY_SECONDS = 0.2
SCORE_BATCH = 256


def score_round(
    config: CampaignConfig, round_number: int, samples: list[dict[str, Any]], early: dict[int, ShardScores], tell: Tell
) -> tuple[dict[str, list[float]], list[float]]:
    """Ask all scorers of the judge: first those that compute here, since a server's answers may cost more.

    Args:
        config: the campaign's configuration.
        round_number: the round.
        samples: its rows of ``samples``, shard after shard.
        early: what is known already, by a shard's index.
        tell: called with how many scores have come.

    Returns:
        Scorer -> a score of every image, and how different the images of each group look.

    Raises:
        D3POError: a scorer is not there, or failed.
    """
    by_shard = shard_scorers(config)
    scores: dict[str, list[float]] = {name: [] for name in config.judge.scorers}
    others = load_scorers(config, [name for name in scores if name not in by_shard])
    with scoring_turn(config, others):
        for start in range(0, len(samples), SCORE_BATCH) if others else ():
            batch = samples[start : start + SCORE_BATCH]
            images = load_pngs([config.folder / sample["image_path"] for sample in batch])
            for name, scorer in others.items():
                scores[name] += scorer(images, [sample["prompt"] for sample in batch]).tolist()
                tell(len(batch))
    dissimilarities: list[float] = []
    rest = iter(samples)
    for shard in round_shards(config, round_number):
        members = list(itertools.islice(rest, len(shard.members)))
        found = early.get(shard.index)
        if found is None:
            found = score_shard(config, members)
            tell(sum(map(len, found.scores.values())))
        for name, values in found.scores.items():
            scores[name] += values
        dissimilarities += found.dissimilarities
    return scores, dissimilarities


class _EarlyScores:
    """A thread that scores the shards of one sampling as they are finished, and what it found."""

    def __init__(self, config: CampaignConfig, shards: list[Shard]) -> None:
        self._config, self._shards = config, shards
        self._found: dict[int, ShardScores] = {}
        self._failure: D3POError | None = None
        self._over = threading.Event()
        # In the run's context, for its log. A daemon: a server that does not answer keeps no process from ending.
        run = contextvars.copy_context().run
        self._thread = threading.Thread(target=run, args=(self._score,), name="score", daemon=True)
        self._thread.start()

    def sampling_is_over(self) -> None:
        """Begin no further shard."""
        self._over.set()

    def found(self) -> dict[int, ShardScores]:
        """What is known by a shard's index; waits for the shard in work.

        Raises:
            D3POError: a scorer failed on that one. What failed earlier is worth another try.
        """
        self._thread.join()
        if self._failure:
            raise self._failure
        return self._found

    def _score(self) -> None:
        try:
            with beside_a_gpu():
                while len(self._found) < len(self._shards) and not self._over.is_set():
                    left = (shard for shard in self._shards if shard.index not in self._found)
                    finished = next((shard for shard in left if shard.rows_path.exists()), None)
                    if finished is None:
                        self._over.wait(LOOK_EVERY_SECONDS)
                        continue
                    samples = pq.ParquetFile(finished.rows_path).read().to_pylist()
                    self._found[finished.index] = score_shard(self._config, samples)
        except D3POError as error:
            if self._over.is_set():
                self._failure = error
            else:
                run_logger().warning("%s (asked while images are sampled; the stage judge asks again)", error)


_early: dict[tuple[Path, int], _EarlyScores] = {}


@contextlib.contextmanager
def scored_meanwhile(config: CampaignConfig, round_number: int, shards: list[Shard]) -> Iterator[None]:
    """Within this context, which is the sampling of a round, its finished shards are scored.

    With a model on the CPU only if a server is among the scorers: anything else would take processors from it.
    """
    on_processors = device_type(config.model.device) == "cpu"
    if not config.scoring.while_sampling or (on_processors and not shard_scorers(config)):
        yield
        return
    early = _EarlyScores(config, shards)
    try:
        yield
    finally:
        early.sampling_is_over()
    _early[config.folder, round_number] = early


def scored_early(config: CampaignConfig, round_number: int) -> dict[int, ShardScores]:
    """What was found while the round was sampled, by a shard's index, once; empty if that was another process.

    Raises:
        D3POError: a scorer failed on the shard that it was asked about when the sampling ended.
    """
    early = _early.pop((config.folder, round_number), None)
    return early.found() if early else {}
