"""Jobs for tests that end badly, and an easy one. They import little, so that they start fast. Not tests themselves."""

import os
import time
from collections.abc import Iterable, Iterator

from accelerate import PartialState

from d3po_core.config import CampaignConfig
from d3po_core.errors import CampaignBusyError
from d3po_core.processes.job import Files, GangJob, Made, QueueJob, Tell

ITEMS = 6


def _none(config: CampaignConfig, round_number: int) -> list[str]:
    return []


def _keep(config: CampaignConfig, round_number: int, files: Files) -> None:
    pass


def _gang(name: str, run: object) -> GangJob:
    return GangJob(f"tests.tasks.rank_ends:{name}", _none, run, _keep)  # type: ignore[arg-type]


def fail(config: CampaignConfig, round_number: int, tell: Tell, kept: object) -> None:
    """Rank 0 meets something that nobody foresaw; rank 1 waits for it in a collective."""
    state = PartialState()
    if state.is_main_process:
        raise KeyError("unforeseen")
    state.wait_for_everyone()


def meet_a_mendable_error(config: CampaignConfig, round_number: int, tell: Tell, kept: object) -> None:
    """Rank 1 meets what a user can mend; rank 0 waits for it in a collective."""
    state = PartialState()
    if state.process_index == 1:
        raise CampaignBusyError("wait for it")
    state.wait_for_everyone()


def hang_once(config: CampaignConfig, round_number: int, tell: Tell, kept: object) -> int:
    """Rank 1 never comes to the collective, the first time; the number of ranks."""
    state = PartialState()
    flag = os.path.join(str(config.runs_dir), config.campaign, "hung")
    if state.process_index == 1 and not os.path.exists(flag):
        open(flag, "w").close()
        time.sleep(600)
    state.wait_for_everyone()
    return state.num_processes


def size(config: CampaignConfig, round_number: int, tell: Tell, kept: object) -> int:
    """The number of ranks, once all have met; rank 1 tells nothing."""
    state = PartialState()
    tell(1)
    for _ in range(round_number):
        time.sleep(0.1)
        state.wait_for_everyone()
    return state.num_processes


def squares(config: CampaignConfig, round_number: int, items: Iterable[int | None]) -> Iterator[Made]:
    """Each item's square and the process that found it; an item takes the round's number of tenths of a second."""
    for item in items:
        if item is not None:
            time.sleep(0.1 * round_number)
            yield Made(item, 1, {}, [item**2, os.getpid()])


def squares_of(count: int) -> QueueJob:
    """A job of so many squares."""
    items = lambda config, round_number: list(range(count))  # noqa: E731
    return QueueJob("tests.tasks.rank_ends:SQUARES", items, _none, (), squares, _keep, list)


FAIL, MENDABLE, HANG, SIZE = (
    _gang(name, run)
    for name, run in (("FAIL", fail), ("MENDABLE", meet_a_mendable_error), ("HANG", hang_once), ("SIZE", size))
)
SQUARES = squares_of(ITEMS)
