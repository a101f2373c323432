"""Batches are drawn in order and written behind: all of them, once, never more than three in memory."""

import threading

import numpy as np
import pytest
import torch

from d3po_core.config import ModelConfig, SampleConfig
from d3po_core.models.loaded import load_policy
from d3po_core.models.policy import Policy
from d3po_core.sampling import drawing
from d3po_core.sampling.drawing import MOST_IN_MEMORY, draw_and_write
from d3po_core.sampling.rollout import Drawn, FirstOutputs, Trajectories, draw_images
from tests.core.sampling.drawing import image_seed

CONFIG = SampleConfig(num_steps=2)
SEEDS = [[image_seed("a red circle on a gray background", 2 * batch + k) for k in range(2)] for batch in range(5)]
BATCHES = list(enumerate(SEEDS))


def nothing(number: int, drawn: Drawn) -> None:
    pass


def first(policy: Policy) -> FirstOutputs:
    return FirstOutputs(policy, CONFIG, [seed for batch in SEEDS for seed in batch], torch.float32)


def test_every_batch_is_written_as_it_is_drawn_alone() -> None:
    policy = load_policy(ModelConfig(device="cpu"), seed=0)
    written: dict[int, tuple[Trajectories, np.ndarray]] = {}

    def write(index: int, trajectories: Trajectories, images: np.ndarray, _: None) -> int:
        assert threading.current_thread() is not threading.main_thread()
        written[index] = trajectories, images
        return index

    assert list(draw_and_write(policy, CONFIG, [None, *BATCHES], first(policy), write, nothing)) == [0, 1, 2, 3, 4]
    for index, batch in BATCHES:
        trajectories, images = draw_images(policy, CONFIG, batch, torch.float32)
        assert torch.equal(written[index][0].latents_BTCHW, trajectories.latents_BTCHW)
        assert (written[index][1] == images).all()


def test_drawing_waits_for_a_slow_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load_policy(ModelConfig(device="cpu"), seed=0)
    drawn, written = 0, 0
    most, may_write = 0, threading.Semaphore(0)

    def draw(*_: object) -> Drawn:
        nonlocal drawn, most
        drawn += 1
        most = max(most, drawn - written)
        if drawn >= MOST_IN_MEMORY:
            may_write.release()
        return Drawn(Trajectories(torch.zeros(1, 2, 1, 1, 1), torch.zeros(1)), torch.zeros(1), None)

    def write(*_: object) -> None:
        nonlocal written
        assert may_write.acquire(timeout=60)
        written += 1

    monkeypatch.setattr(drawing, "start_drawing", draw)
    in_turn = draw_and_write(policy, CONFIG, BATCHES, first(policy), write, nothing)
    for _ in range(3):  # as many as were drawn beyond the first two
        next(in_turn)
    may_write.release(2)
    assert len(list(in_turn)) == 2
    assert (drawn, written, most) == (5, 5, MOST_IN_MEMORY)


def test_a_file_that_cannot_be_written_ends_the_drawing() -> None:
    policy = load_policy(ModelConfig(device="cpu"), seed=0)

    def write(index: int, *_: object) -> None:
        raise OSError(f"batch {index}")

    with pytest.raises(OSError, match="batch 0"):
        list(draw_and_write(policy, CONFIG, BATCHES, first(policy), write, nothing))
