"""Curves as SVG, drawn by matplotlib in stand-in colours that are replaced by the page's light and dark ones."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from d3po_core.records import ScoreSummary

# Stand-in colour -> the page's variable.
INK, MUTED, GRID, PAPER = "#010101", "#020202", "#030303", "#040404"
ACCENT, GOOD = "#050505", "#060606"
SERIES = ("#0a0a0a", "#0b0b0b", "#0c0c0c", "#0d0d0d", "#0e0e0e", "#0f0f0f")
_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "line", PAPER: "card", ACCENT: "accent", GOOD: "good"}
_VARIABLES |= {colour: f"series-{i}" for i, colour in enumerate(SERIES)}

# More bars than this are thinner than a pixel, and take seconds to draw.
MOST_BARS = 200
WIDE, NARROW, SMALL = (9.6, 3.1), (3.7, 2.7), (3.7, 1.75)
_STYLE = {
    "svg.fonttype": "none", "font.size": 9, "axes.edgecolor": GRID, "axes.labelcolor": MUTED, "text.color": INK,
    "xtick.color": MUTED, "ytick.color": MUTED, "axes.grid": True, "axes.grid.axis": "y", "grid.color": GRID,
    "grid.linewidth": 0.6, "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
    "xtick.major.size": 0, "ytick.major.size": 0, "axes.axisbelow": True, "text.parse_math": False,
    "svg.image_inline": True, "path.simplify": True,
}  # fmt: skip


def score_curve(
    name: str, rounds: Sequence[int], scores: Sequence[ScoreSummary], champion: int, size: tuple[float, float]
) -> Markup:
    """Draw the held-out mean by round: interval as a band, base as a dashed line, champion as a point."""

    def draw(axes: Axes) -> None:
        means = [score.mean for score in scores]
        low, high = (np.clip([getattr(score, end) for score in scores], -1e300, 1e300) for end in ("low", "high"))
        if np.all(np.abs(np.concatenate([low, high])) < 1e300):  # a single image has no interval
            axes.fill_between(rounds, low, high, color=ACCENT, alpha=0.16, linewidth=0)
        axes.axhline(means[0], color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
        axes.plot(rounds, means, color=ACCENT, linewidth=2, marker="o" if len(rounds) == 1 else None, markersize=4)
        axes.plot(rounds[champion], means[champion], "o", color=GOOD, markersize=8, markeredgecolor=PAPER, zorder=5)
        axes.annotate(f"{means[0]:.3g} base", (rounds[-1], means[0]), (0, -4), textcoords="offset points", ha="right",
                      va="top", color=MUTED)  # fmt: skip
        if champion:
            axes.annotate(f"{means[champion]:.3g}", (rounds[champion], means[champion]), (0, 8), color=INK, ha="center",
                          textcoords="offset points", weight="bold")  # fmt: skip
        axes.margins(x=0.02, y=0.12)
        axes.set_xlabel("round")

    return _svg(draw, size, name, f"Held-out score by round, from {scores[0].mean:.3g} to {scores[-1].mean:.3g}")


def small_curve(name: str, rounds: Sequence[int], values: Sequence[float | None], label: str) -> Markup:
    """Draw a quantity by round; a round without a value (None) leaves a gap."""

    def draw(axes: Axes) -> None:
        numbers = np.array([np.nan if value is None else value for value in values], dtype=float)
        axes.plot(rounds, numbers, color=ACCENT, linewidth=1.6, marker="o" if len(rounds) < 3 else None, markersize=4)
        there = numbers[np.isfinite(numbers)]
        if there.size and there.min() > 0 and there.max() > 1000 * np.median(there):
            axes.set_yscale("log")  # one wild round would flatten all others
            axes.yaxis.set_major_formatter("{x:.0e}")  # the default would write mathematical text
        axes.margins(x=0.02, y=0.12)

    return _svg(draw, SMALL, name, label)


def stacked_bars(name: str, rounds: Sequence[int], parts: Mapping[str, Sequence[float]], label: str) -> Markup:
    """Draw parts of a whole, one bar per round or, if there are many, areas.

    The page names the parts in the order of ``SERIES``.
    """

    def draw(axes: Axes) -> None:
        bottom = np.zeros(len(rounds))
        for colour, values in zip(SERIES, parts.values(), strict=False):
            top = bottom + np.asarray(values, dtype=float)
            if len(rounds) <= MOST_BARS:
                axes.bar(rounds, values, bottom=bottom, color=colour, width=0.8)
            else:
                axes.fill_between(rounds, bottom, top, step="mid", color=colour, linewidth=0)
            bottom = top
        axes.margins(x=0.02)

    return _svg(draw, SMALL, name, label)


def _svg(draw: Any, size: tuple[float, float], name: str, label: str) -> Markup:
    # The salt makes a figure's ids unique within the page and the same every time.
    with rc_context(_STYLE | {"svg.hashsalt": f"{name} {size}"}):  # type: ignore[arg-type]
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        draw(axes)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        if axes.get_yscale() == "linear":
            axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
            axes.ticklabel_format(axis="y", useOffset=False, scilimits=(-4, 5))
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _for_page(buffer.getvalue(), label)


def _for_page(svg: str, label: str) -> Markup:
    """Return only the ``<svg>`` element: used ids, no fixed size, no addresses, the page's colours."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Its style sheet would apply to the whole page.
    svg = re.sub(r"<style.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL)
    used = set(re.findall(r"#([A-Za-z0-9_-]+)", svg))
    svg = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in used else "", svg)
    box = re.search(r'viewBox="([^"]+)"', svg)
    assert box is not None
    head = Markup('<svg viewBox="{}" role="img" aria-label="{}">').format(box[1], label)
    svg = re.sub(r"<svg[^>]*>", lambda _: str(head), svg, count=1)
    svg = re.sub(r"font-family: [^;\"]+;?", "", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    # Safe as markup: matplotlib escapes texts, and Markup.format above escapes the label.
    return Markup(re.sub(r"\s*\n\s*", " ", svg).strip())
