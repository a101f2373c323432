"""Code that the stages of a round share: progress bars, the GPU's turn, retries after a failure."""

import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import Any

from prefect.concurrency.sync import concurrency
from tqdm import tqdm

from d3po.tasks.showing import StageProgress
from d3po_core.config import CampaignConfig
from d3po_core.devices import device_type
from d3po_core.errors import D3POError
from d3po_core.scorers.finding import use_device
from d3po_core.store.stages import note_seconds, seconds_spent

GPU_LIMIT = "gpu"
GPU_LEASE_SECONDS = 60

# Prefect caches nothing: a stage's record on disk says that it is finished, also to another run.
STAGE_OPTIONS: dict[str, Any] = {
    "persist_result": False,
    "retries": 1,
    "retry_delay_seconds": 5,
    "retry_condition_fn": lambda task, run, state: not _is_users_to_mend(state),
}


def _is_users_to_mend(state: Any) -> bool:
    try:
        state.result()
    except D3POError:
        return True
    except Exception:
        return False
    return False


@contextlib.contextmanager
def gpu_turn(device_type: str) -> Iterator[None]:
    """On a GPU, wait for the global concurrency limit ``gpu``; a killed process's turn ends with its lease.

    A server without that limit, such as the temporary one of ``d3po run``, lets everyone go at once.
    """
    if device_type != "cuda":
        yield
        return
    with concurrency(GPU_LIMIT, occupy=1, lease_duration=GPU_LEASE_SECONDS, strict=False):
        yield


@contextlib.contextmanager
def model_turn(config: CampaignConfig) -> Iterator[None]:
    """Wait for the GPU's turn if the campaign's model runs there."""
    with gpu_turn(device_type(config.model.device)):
        yield


@contextlib.contextmanager
def scoring_turn(config: CampaignConfig, names: Iterable[str]) -> Iterator[None]:
    """Wait for the GPU's turn if one of these scorers runs there."""
    with gpu_turn(use_device(names, config.scoring, config.model.device)):
        yield


# tqdm's monitor thread outlives the interpreter's shutdown; duckdb then complains of leaks.
tqdm.monitor_interval = 0


class Bar:
    """A stage's progress: a bar with rate and time left on terminals, and on Prefect's page.

    It also notes on disk how long the stage has taken, for the run that continues after a kill.

    Args:
        config: the campaign's.
        round_number: the round.
        stage: the stage's name.
        total: the number of units.
        unit: what is counted.
        done: units that an earlier run did; they do not count for the rate.
    """

    def __init__(self, config: CampaignConfig, round_number: int, stage: str, total: int, unit: str, done: int) -> None:
        self._stage = (config.folder, round_number, stage)
        self._earlier = seconds_spent(*self._stage)
        self._label, self._total, self._unit, self._done, self._first = (
            f"round {round_number} {stage}", total, unit, done, done,
        )  # fmt: skip
        self._bar = tqdm(total=total, initial=done, desc=self._label, unit=unit, dynamic_ncols=True, disable=None)
        self._shown, self._began = StageProgress(), time.monotonic()

    def update(self, count: int = 1) -> None:
        """Count this many more as done."""
        self._bar.update(count)
        self._done += count
        self._shown.tell(self._done / self._total, self._text)
        self._note()

    def close(self, whole: bool) -> None:
        """End the bar; ``whole`` says whether the stage did all its work."""
        self._bar.close()
        self._note()
        if whole:
            self._shown.end(self._text)

    def _note(self) -> None:
        note_seconds(*self._stage, self._earlier + time.monotonic() - self._began)

    def _text(self) -> str:
        seconds = time.monotonic() - self._began
        return tqdm.format_meter(
            self._done, self._total, seconds, prefix=self._label, unit=f" {self._unit}s", initial=self._first,
            bar_format="{desc}: {n_fmt} of {total_fmt}{unit}, {rate_noinv_fmt}, {remaining} left",
        )  # fmt: skip


@contextlib.contextmanager
def progress(
    config: CampaignConfig, round_number: int, stage: str, total: int, unit: str, done: int = 0
) -> Iterator[Bar]:
    """Show a stage's progress; ``done`` of ``total`` units are done already."""
    bar = Bar(config, round_number, stage, total, unit, done)
    try:
        yield bar
    except BaseException:
        bar.close(whole=False)
        raise
    bar.close(whole=True)
