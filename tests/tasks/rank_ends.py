"""Jobs for tests that end badly. They import little, so that their ranks start fast. Not tests by themselves."""

import os
import time

import torch
from accelerate import PartialState

from d3po_core.config import CampaignConfig
from d3po_core.errors import CampaignBusyError
from d3po_core.processes.job import Tell


def die(config: CampaignConfig, round_number: int, tell: Tell) -> None:
    """Rank 1 says something and leaves; rank 0 waits for it in a collective."""
    state = PartialState()
    print(f"the last words of rank {state.process_index}")
    if state.process_index == 1:
        os._exit(3)
    state.wait_for_everyone()


def fail(config: CampaignConfig, round_number: int, tell: Tell) -> None:
    """Rank 0 meets something that nobody foresaw."""
    if PartialState().is_main_process:
        raise KeyError("unforeseen")
    time.sleep(600)


def work_without_end(config: CampaignConfig, round_number: int, tell: Tell) -> None:
    """Rank 0 computes, rank 1 waits for it in a collective."""
    state = PartialState()
    tell(1)
    while state.is_main_process:
        torch.ones(100, 100) @ torch.ones(100, 100)
    state.wait_for_everyone()


def meet_a_mendable_error(config: CampaignConfig, round_number: int, tell: Tell) -> None:
    """Rank 1 meets what a user can mend; rank 0 waits for it in a collective."""
    state = PartialState()
    if state.process_index == 1:
        raise CampaignBusyError("wait for it")
    state.wait_for_everyone()
