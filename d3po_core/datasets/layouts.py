"""Read a row of a published data set: its prompt, its images, and what was said of them.

    pick-a-pic   jpg_0, jpg_1, label_0 (1, 0, or 0.5 for a tie), caption; label_1 and has_label if they are there
    chosen       a better and a worse image: winner, loser; chosen, rejected; image_w, image_l; good_jpg, bad_jpg
    hpd          image_path (a list of two), human_preference (a list: 1 for the chosen one), prompt
    hpd-ranks    image_path (a list), rank (a list: the best image has the lowest), prompt
    imagereward  generations (a list), ranking (a list: the best image has the lowest), prompt
    score        image, score (a number; higher is better), prompt
    good-bad     image, label (1, true or good; 0, false or bad), prompt

Sources: the columns of Pick-a-Pic v2 (huggingface.co/datasets/yuvalkirstain/pickapic_v2), of HPDv2
(huggingface.co/datasets/ymhao/HPDv2), and of ImageReward (github.com/THUDM/ImageReward, data/test.json).
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from d3po_core.errors import D3POError

Kind = Literal["choice", "rank", "score", "rating"]
Row = Mapping[str, Any]

PROMPT = ("caption", "prompt", "text")
IMAGE = ("image", "jpg", "file_name", "image_path", "path")
GOOD, BAD = ("1", "1.0", "true", "good"), ("0", "0.0", "false", "bad")


class RowError(ValueError):
    """A row cannot be used; the message says why."""


@dataclass(frozen=True)
class Entry:
    """A usable row.

    Attributes:
        prompt: its prompt.
        images: bytes of image files, or their paths.
        kind: as in the table ``judgements``; ``rating`` is 1 for good and 0 for bad.
        values: what was said of each image; of a choice 1 for the chosen image and -1 for the other, 0 for a tie.
    """

    prompt: str
    images: tuple[Any, ...]
    kind: Kind
    values: tuple[float, ...]


@dataclass(frozen=True)
class Layout:
    """Columns that a table needs besides the prompt's, each under one of several names, and what they mean.

    Attributes:
        name: as typed for ``--layout``.
        needs: for each needed column, its possible names.
        kind: what its labels become.
        said: the images and values of a row, from its needed cells and the whole row.
    """

    name: str
    needs: tuple[tuple[str, ...], ...]
    kind: Kind
    said: Callable[[list[Any], Row], tuple[tuple[Any, ...], tuple[float, ...]]]

    def found(self, columns: Collection[str]) -> list[str] | None:
        """Return the names of the needed columns and of the prompt's, last; None if a table lacks one."""
        names = [next((name for name in known if name in columns), None) for known in (*self.needs, PROMPT)]
        return None if None in names else [str(name) for name in names]

    def read(self, row: Row, columns: Collection[str]) -> Entry:
        """Return what a row says.

        Raises:
            RowError: it cannot be used.
        """
        *cells, prompt = (row.get(name) for name in self.found(columns) or ())
        if not isinstance(prompt, str) or not prompt.strip():
            raise RowError("has no prompt")
        images, values = self.said(cells, row)
        return Entry(prompt.strip(), images, self.kind, values)


Said = tuple[tuple[Any, ...], tuple[float, ...]]


def _pick_a_pic(cells: list[Any], row: Row) -> Said:
    first, second, label = cells
    if str(row.get("has_label", True)).strip().lower() in ("false", "0"):
        raise RowError("has_label is false: nobody compared its images")
    value = _number(label, "label_0")
    other = 1 - value if row.get("label_1") is None else _number(row["label_1"], "label_1")
    if not (0 <= value <= 1 and 0 <= other <= 1):
        raise RowError(f"labels are {value:g} and {other:g}; expected 1, 0, or 0.5 for a tie")
    return (first, second), _choice(value, other)


def _choice(first: float, second: float) -> tuple[float, float]:
    """Return what a choice says of two images whose labels are these; the higher one was chosen."""
    value = float((first > second) - (first < second))
    return value, -value + 0.0


def _pair_of_lists(cells: list[Any], row: Row) -> Said:
    images, values = _lists(cells, "human_preference")
    if len(images) != 2:
        raise RowError(f"has {len(images)} images; expected a pair")
    return images, _choice(*values)


def _ranks(cells: list[Any], row: Row) -> Said:
    images, values = _lists(cells, "ranking")
    if len(images) < 2:
        raise RowError(f"ranks {len(images)} images; expected two or more")
    return images, values


def _lists(cells: list[Any], what: str) -> Said:
    images, values = cells
    if not isinstance(images, list) or not isinstance(values, list) or len(images) != len(values):
        raise RowError(f"has no lists of images and of {what} of equal length")
    return tuple(images), tuple(_number(value, what) for value in values)


def _good_or_bad(cells: list[Any], row: Row) -> Said:
    image, label = cells
    said = str(label).strip().lower()
    if said not in GOOD + BAD:
        raise RowError(f"label is {label!r}; expected good or bad (1 or 0, true or false)")
    return (image,), (float(said in GOOD),)


def _number(value: Any, what: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise RowError(f"{what} is {value!r}; expected a number")
    return number


_LAYOUTS = (
    Layout("pick-a-pic", (("jpg_0", "image_0"), ("jpg_1", "image_1"), ("label_0",)), "choice", _pick_a_pic),
    *(
        Layout("chosen", ((better,), (worse,)), "choice", lambda cells, row: ((cells[0], cells[1]), (1.0, -1.0)))
        for better, worse in (("winner", "loser"), ("chosen", "rejected"), ("image_w", "image_l"),
                              ("good_jpg", "bad_jpg"))
    ),
    Layout("hpd", (("image_path", "images"), ("human_preference",)), "choice", _pair_of_lists),
    Layout("hpd-ranks", (("image_path", "images"), ("rank",)), "rank", _ranks),
    Layout("imagereward", (("generations", "images"), ("ranking",)), "rank", _ranks),
    Layout("score", (IMAGE, ("score",)), "score", lambda cells, row: ((cells[0],), (_number(cells[1], "score"),))),
    Layout("good-bad", (IMAGE, ("label",)), "rating", _good_or_bad),
)  # fmt: skip
NAMES = tuple(dict.fromkeys(layout.name for layout in _LAYOUTS))
OPTIONAL = ("label_1", "has_label")


def layout_of(columns: Collection[str], where: str, name: str | None = None) -> Layout:
    """Return the layout of a table with these columns.

    Args:
        columns: the table's columns, under our names.
        where: the table's file, for messages.
        name: the only layout to consider.

    Raises:
        D3POError: none fits; one line with the columns that were found and those that are expected.
    """
    wanted = [layout for layout in _LAYOUTS if name in (None, layout.name)]
    if not wanted:
        raise D3POError(f"--layout {name!r}: expected one of {', '.join(NAMES)}")
    fitting = next((layout for layout in wanted if layout.found(columns)), None)
    if fitting is None:
        expected = "; or ".join(f"{layout.name}: {_needed(layout)}" for layout in wanted)
        raise D3POError(
            f"{where}: has the columns {', '.join(columns) or 'none'}; expected a prompt ({' or '.join(PROMPT)}) and "
            f"{expected}; other names: --columns ours=theirs"
        )
    return fitting


def _needed(layout: Layout) -> str:
    return ", ".join(known[0] for known in layout.needs)
