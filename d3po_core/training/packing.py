"""Split an update's work: shuffled cells, packed into micro-batches, with duplicate rows merged.

A cell is one group at one step. Group members that share x_T are still identical at the first step, so one of them
passes through the network for all.

Tensor names carry their shape: N images with a pair, T steps, R rows (one image at one step) of a micro-batch, P pairs.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from d3po_core.devices import send
from d3po_core.seeds import permutation


@dataclass(frozen=True)
class PairedGroup:
    """One group's labelled images, by index in the training set, and its pairs.

    ``numbers`` has one label per image if the objective takes them: its advantage in the group, or 1 for good and -1
    for bad.
    """

    images: tuple[int, ...]
    pairs: tuple[tuple[int, int, float], ...]
    numbers: tuple[float, ...] = ()


Cell = tuple[PairedGroup, int]


def shuffled_cells(groups: list[PairedGroup], steps: list[int], seed: int) -> list[Cell]:
    """Return all groups at all steps, in random order."""
    cells = [(group, step) for group in groups for step in steps]
    return [cells[index] for index in permutation(seed, len(cells))]


def measured_cells(groups: list[PairedGroup], steps: list[int], share: float, seed: int) -> list[Cell]:
    """Return every group at about this share of the steps, at least one, spread evenly over the steps."""
    if not share or not steps:
        return []
    count = max(1, round(share * len(steps)))
    return [
        (groups[group], steps[(place + k * len(steps) // count) % len(steps)])
        for place, group in enumerate(permutation(seed, len(groups)))
        for k in range(count)
    ]


def equal_starts(groups: list[PairedGroup], latents_NTCHW: torch.Tensor) -> list[int]:
    """Return, for each image, the first of its group that starts from the same x_T, ``[N]``."""
    starts = list(range(len(latents_NTCHW)))
    for group in groups:
        for place, image in enumerate(group.images):
            own = latents_NTCHW[image, 0]
            starts[image] = next((i for i in group.images[:place] if torch.equal(latents_NTCHW[i, 0], own)), image)
    return starts


def num_passes(cell: Cell, start_N: list[int]) -> int:
    """Return the number of a cell's rows that pass through the network."""
    group, step = cell
    return len({start_N[image] for image in group.images}) if step == 0 else len(group.images)


def equal_rows(start_N: list[int], image_R: torch.Tensor, step_R: torch.Tensor) -> torch.Tensor:
    """Return, for each row, the first row with the same network input, ``[R]``."""
    first: dict[tuple[int, int], int] = {}
    keys = [
        (start_N[image] if step == 0 else image, step)
        for image, step in zip(image_R.tolist(), step_R.tolist(), strict=True)
    ]
    return torch.tensor([first.setdefault(key, row) for row, key in enumerate(keys)])


def micro_batches(cells: list[Cell], start_N: list[int], rows: int) -> Iterator[list[Cell]]:
    """Pack cells first-fit into micro-batches of at most ``rows`` network rows; a larger cell gets its own."""
    waiting = [(num_passes(cell, start_N), cell) for cell in cells]
    while waiting:
        packed: list[Cell] = []
        left: list[tuple[int, Cell]] = []
        room = rows
        for size, cell in waiting:
            if size <= room or not packed:
                packed.append(cell)
                room -= size
            else:
                left.append((size, cell))
        yield packed
        waiting = left


def rows_of(cells: list[Cell]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return image and step of every row of a micro-batch, each ``[R]``."""
    image_R = torch.tensor([i for group, _ in cells for i in group.images], dtype=torch.long)
    return image_R, torch.tensor([step for group, step in cells for _ in group.images], dtype=torch.long)


def labels_of(cells: list[Cell], device: torch.device) -> dict[str, torch.Tensor]:
    """Return winner row, loser row, weight and step of every pair, and cell and number of every row, on a device."""
    winners, losers, weights, steps, first_row = [], [], [], [], 0
    for group, step in cells:
        row_of = {image: first_row + k for k, image in enumerate(group.images)}
        for winner, loser, weight in group.pairs:
            winners.append(row_of[winner])
            losers.append(row_of[loser])
            weights.append(weight)
            steps.append(step)
        first_row += len(group.images)
    whole = {
        "winner_P": winners, "loser_P": losers, "step_P": steps,
        "cell_R": [cell for cell, (group, _) in enumerate(cells) for _ in group.images],
    }  # fmt: skip
    real = {"weight_P": weights, "number_R": [number for group, _ in cells for number in group.numbers]}
    tensors = {name: torch.tensor(values, dtype=torch.long) for name, values in whole.items()}
    tensors |= {name: torch.tensor(values, dtype=torch.float32) for name, values in real.items()}
    return {name: send(tensor, device) for name, tensor in tensors.items()}
