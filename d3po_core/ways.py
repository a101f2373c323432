"""The ways of judging a group of images, defined here and nowhere else."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Mode = Literal["pair", "mark_bad", "best", "rank"]


@dataclass(frozen=True)
class Way:
    """One way of judging.

    Attributes:
        kind: the kind of judgement that is stored.
        columns: a sheet's columns for it, besides those of every sheet.
        sheet: a sheet's instruction to the rater.
        task: what the page asks the rater to do.
        guideline: what raters look for if the campaign does not say it.
        image: what choosing an image means, for a screen reader.
        fits: returns whether an answer's sorted values, one per image, are valid, given also the number of images.
    """

    kind: Literal["choice", "rating", "rank"]
    columns: tuple[str, ...]
    sheet: str
    task: str
    guideline: str
    image: str
    fits: Callable[[Sequence[float], int], bool]


WAYS: dict[str, Way] = {
    "pair": Way(
        "choice", ("first_id", "second_id", "choice"),
        "Write first, second, tie or both bad in the column choice; skip if you cannot say.",
        "Which one is better?", "Which image shows better what the prompt says?", "this one is better",
        lambda values, size: values in ([-1, 1], [0, 0], [-1, -1]),
    ),
    "mark_bad": Way(
        "rating", ("group_id", "sample_id", "rating"),
        "Write bad or good in the column rating; skip if you cannot say.",
        "Mark the bad ones", "Which images do not show what the prompt says?", "bad",
        lambda values, size: set(values) <= {0, 1},
    ),
    "best": Way(
        "rank", ("group_id", "sample_id", "rank"),
        "Write 1 in the column rank at the best image of a group, and 2 at all its others; skip if you cannot say.",
        "Pick the best one", "Which image shows best what the prompt says?", "this one is the best",
        lambda values, size: values == [1] + [2] * (size - 1),
    ),
    "rank": Way(
        "rank", ("group_id", "sample_id", "rank"),
        "Write 1 in the column rank at the best image of a group, 2 at the next, and so on; the same number where "
        "two are equally good, skip where you cannot say.",
        "Pick from best to worst", "How well does each image show what the prompt says?", "next in the order",
        lambda values, size: sorted(set(values)) == list(range(1, len(set(values)) + 1)),
    ),
}  # fmt: skip
