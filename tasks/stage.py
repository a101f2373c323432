"""Code that the stages of a round share: progress bars, the GPU's turn, retries after a failure."""

import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import Any

from prefect.concurrency.sync import concurrency
from prefect.runtime import flow_run
from tqdm import tqdm

from d3po.tasks.live_line import is_shown, say
from d3po.tasks.logs import flow_logger
from d3po.tasks.mirroring import require_lease
from d3po.tasks.showing import StageProgress
from d3po_core.config import CampaignConfig
from d3po_core.devices import device_type
from d3po_core.errors import D3POError
from d3po_core.scorers.finding import use_device
from d3po_core.store.goals import last_round_of
from d3po_core.store.stages import note_seconds, seconds_spent

GPU_LIMIT = "gpu"
GPU_LEASE_SECONDS = 60
# Lines in the log of a long stage.
LOG_FIRST_SECONDS, LOG_EVERY_SECONDS = 20.0, 60.0

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


class Bar:
    """A stage's progress, with rate and time left: on the terminal's live line and on Prefect's page.

    Without a live line, it goes to the run's log at times. It also notes on disk how long the stage has taken, for the
    run that continues after a kill.

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
        last = last_round_of(config.folder, str(flow_run.id))
        label = f"round {round_number} of {last} {stage}" if last else f"round {round_number} {stage}"
        self._label, self._total, self._unit, self._done, self._first = label, total, unit, done, done
        self._shown, self._began = StageProgress(), time.monotonic()
        self._due = self._began + LOG_FIRST_SECONDS
        say(self._line)

    def update(self, count: int = 1) -> None:
        """Count this many more as done.

        Raises:
            LeaseLostError: another machine took the campaign over, so the stage is done there.
        """
        require_lease(self._stage[0])
        self._done += count
        say(self._line)
        self._shown.tell(self._done / self._total, self._text)
        self._log()
        self._note()

    def close(self, whole: bool) -> None:
        """End the bar; ``whole`` says whether the stage did all its work."""
        self._note()
        if whole:
            self._shown.end(self._text)

    def _log(self) -> None:
        now = time.monotonic()
        if now >= self._due and not is_shown():
            self._due = now + LOG_EVERY_SECONDS
            flow_logger().info("%s", self._text())

    def _note(self) -> None:
        note_seconds(*self._stage, self._earlier + time.monotonic() - self._began)

    def _line(self) -> str:
        finished = self._done >= self._total
        return f"{self._label}: all {self._total} {self._unit}s done, finishing" if finished else self._text()

    def _text(self) -> str:
        told = "{desc}: {n_fmt} of {total_fmt}{unit}"
        if self._done > self._first:
            told += ", {rate_noinv_fmt}, {remaining} left"
        text = tqdm.format_meter(
            self._done, self._total, time.monotonic() - self._began, prefix=self._label, unit=f" {self._unit}s",
            initial=self._first, bar_format=told,
        )  # fmt: skip
        return " ".join(text.split())


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
