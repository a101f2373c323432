"""Score a round's images, some of them early: finished shards are scored while others are sampled.

Only scorers that take nothing from sampling run early: servers, learned scorers that have a GPU of their own
(``scoring.gpus``) and, if the model is on a GPU, the built-in proxies. Another learned scorer waits for its turn on the
device, and a user's function may need the device as well. Early scores lie beside the shard's rows in staging. The
stage judge finds them there, also after a kill.
"""

import contextlib
import contextvars
import itertools
import threading
from collections.abc import Iterator
from typing import Any

import pyarrow.parquet as pq

from d3po.tasks.logs import run_logger
from d3po.tasks.stage import scoring_turn
from d3po_core.config import CampaignConfig
from d3po_core.devices import device_type
from d3po_core.errors import D3POError, RankError
from d3po_core.processes.engine import run_job
from d3po_core.processes.job import Tell
from d3po_core.sampling.job import Shard
from d3po_core.scorers.finding import load_scorers
from d3po_core.scorers.job import score_job
from d3po_core.scorers.shards import ShardScores, read_scores, score_shard, shard_scorers, write_scores
from d3po_core.store.images import beside_a_gpu, load_pngs

LOOK_EVERY_SECONDS = 0.2
SCORE_BATCH = 256
# Scorers with GPUs of their own get so many shards in one turn.
SHARDS_PER_GPU = 4


def score_round(
    config: CampaignConfig,
    shards: list[Shard],
    samples: list[dict[str, Any]],
    early: dict[int, ShardScores],
    tell: Tell,
) -> tuple[dict[str, list[float]], list[float]]:
    """Run all scorers of the judge; local ones first, since a server's answers may cost more.

    Args:
        config: the campaign's configuration.
        shards: the round's shards.
        samples: their rows of ``samples``, shard after shard.
        early: the scores known already, by a shard's index; see ``scored_early``.
        tell: called with the number of new scores.

    Returns:
        Scorer -> one score per image, and per group how different its images look.

    Raises:
        D3POError: a scorer is missing, or failed.
    """
    by_shard = shard_scorers(config)
    scores: dict[str, list[float]] = {name: [] for name in config.judge.scorers}
    others = load_scorers(config, [name for name in scores if name not in by_shard])
    with scoring_turn(config, others):
        for batch in _batches(samples) if others else ():
            images = load_pngs([config.folder / sample["image_path"] for sample in batch])
            for name, scorer in others.items():
                scores[name] += scorer(images, [sample["prompt"] for sample in batch]).tolist()
                tell(len(batch))
    if config.scoring.gpus and by_shard:
        _score_apart(config, [shard for shard in shards if shard.index not in early and shard.rows_path.exists()], tell)
        early = scored_early(config, shards)
    dissimilarities: list[float] = []
    rest = iter(samples)
    for shard in shards:
        members = list(itertools.islice(rest, len(shard.members)))
        found = early.get(shard.index)
        if found is None:
            found = score_shard(config, members)
            tell(sum(map(len, found.scores.values())))
        for name, values in found.scores.items():
            scores[name] += values
        dissimilarities += found.dissimilarities
    return scores, dissimilarities


def _batches(samples: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Split rows into batches of images of one size, in order."""
    for _, alike in itertools.groupby(samples, lambda sample: (sample.get("height"), sample.get("width"))):
        rows = list(alike)
        yield from (rows[start : start + SCORE_BATCH] for start in range(0, len(rows), SCORE_BATCH))


@contextlib.contextmanager
def scored_meanwhile(config: CampaignConfig, shards: list[Shard]) -> Iterator[None]:
    """Within this context, which samples a round, score the shards that are finished.

    If the model runs on the CPU, this needs a server among the scorers: anything else would take cores from the model.
    The context waits at its end for the shard being scored, unless the sampling failed.
    """
    on_processors = device_type(config.model.device) == "cpu"
    if not config.scoring.while_sampling or (on_processors and not shard_scorers(config)):
        yield
        return
    over = threading.Event()
    # It runs in the run's context, to reach its log. As a daemon, it cannot keep the process alive for a silent server.
    run = contextvars.copy_context().run
    thread = threading.Thread(target=run, args=(_score_finished, config, shards, over), name="score", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
    thread.join()


def _score_finished(config: CampaignConfig, shards: list[Shard], over: threading.Event) -> None:
    """Score shards as they finish; start none once the sampling is over."""
    try:
        known = scored_early(config, shards)
        left = [shard for shard in shards if shard.index not in known]
        with beside_a_gpu():
            while left and not over.is_set():
                there = (shard for shard in left if shard.rows_path.exists())
                finished = list(itertools.islice(there, SHARDS_PER_GPU * config.scoring.gpus or 1))
                if config.scoring.gpus:
                    _score_apart(config, finished, lambda count: None)
                else:
                    for shard in finished:
                        write_scores(shard, score_shard(config, pq.ParquetFile(shard.rows_path).read().to_pylist()))
                left = [shard for shard in left if shard not in finished]
                if not finished:
                    over.wait(LOOK_EVERY_SECONDS)
    except (D3POError, RankError) as error:
        run_logger().warning("%s (asked while images are sampled; the stage judge asks again)", error)


def _score_apart(config: CampaignConfig, shards: list[Shard], tell: Tell) -> None:
    """Let the scorers that have GPUs of their own score finished shards, few at a time."""
    few = SHARDS_PER_GPU * config.scoring.gpus
    for start in range(0, len(shards), few):
        run_job(score_job(shards[start : start + few]), config, shards[start].round_number, tell, "scorer")


def scored_early(config: CampaignConfig, shards: list[Shard]) -> dict[int, ShardScores]:
    """Scores that are known before the stage judge starts, by a shard's index.

    Raises:
        D3POError: a file of early scores is damaged.
    """
    scorers = shard_scorers(config)
    found = {shard.index: read_scores(shard, scorers) for shard in shards}
    return {index: scores for index, scores in found.items() if scores}
