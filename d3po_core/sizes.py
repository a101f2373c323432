"""Sizes of images in pixels: the grid of a model's family, and the sizes of it that lie nearest to another.

A size is (height, width). None stands for the size that the network was trained with.
"""

from dataclasses import dataclass

from d3po_core.errors import D3POError

Size = tuple[int, int]


@dataclass(frozen=True)
class Grid:
    """The sizes that a family draws: sides that are multiples of ``step`` pixels, up to ``most``.

    Attributes:
        family: the class of its pipeline, for messages.
        step: the smallest side, and the distance between two, in pixels.
        most: the longest side in pixels; None if there is no limit.
    """

    family: str
    step: int
    most: int | None = None

    def fits(self, size: Size) -> bool:
        """Return whether the family draws this size."""
        return all(side % self.step == 0 and side >= self.step and side <= (self.most or side) for side in size)

    def nearest(self, size: Size) -> list[Size]:
        """Return the sizes that fit, with both sides rounded down and rounded up; one if they are the same."""
        rounded = [[self._within(side // self.step * self.step) for side in size]]
        rounded += [[self._within(-(-side // self.step) * self.step) for side in size]]
        return list(dict.fromkeys((height, width) for height, width in rounded))

    def _within(self, side: int) -> int:
        return max(self.step, min(side, self.most // self.step * self.step if self.most else side))

    def check(self, size: Size, field: str) -> None:
        """Check that the family draws this size.

        Raises:
            D3POError: it does not; the message names the field and the nearest sizes that fit.
        """
        if self.fits(size):
            return
        most, near = f" up to {self.most}" if self.most else "", " and ".join(map(in_words, self.nearest(size)))
        raise D3POError(
            f"{field} of {in_words(size)} pixels does not fit a {self.family}; expected multiples of {self.step}{most}"
            f", height x width: nearest are {near}"
        )


def in_words(size: Size) -> str:
    """Return a size in words, such as ``512 x 768``: height, then width."""
    return f"{size[0]} x {size[1]}"


def given(height: int | None, width: int | None, section: str) -> Size | None:
    """Return the size that two settings give; None if neither is set.

    Raises:
        ValueError: only one is set.
    """
    if height is None and width is None:
        return None
    if height is None or width is None:
        there, missing = ("width", "height") if height is None else ("height", "width")
        raise ValueError(f"{section}.{there} is set and {section}.{missing} is not; set both, or neither")
    return height, width
