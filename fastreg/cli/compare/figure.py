"""Draws the curves of `fastreg compare` as a picture."""

import itertools
import math
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .results import Result

# Okabe & Ito, then Tol's muted, then colours between: distinct with any colour vision as far as possible.
# The baselines are black and grey.
COLOURS = {
    "torch": "#9a9a9a", "plain": "#000000", "clip": "#56b4e9", "noise": "#e69f00",
    "ema": "#009e73", "decay": "#cc79a7", "all": "#d55e00",
    "swa": "#117733", "lookahead": "#0072b2", "sam": "#882255", "asam": "#aa4499", "msam": "#999933",
}  # fmt: skip
SPARE = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#332288", "#cc3311", "#44aa99",
    "#b8860b", "#7b5ea7", "#8c564b", "#6b8e23", "#ee3377", "#4477aa", "#5d4037",
)  # fmt: skip
DASHES = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1, 1, 1)))
"""Line styles of the curves of one colour, in their order."""
INK, FAINT = "#222222", "#dddddd"
LINE = 0.205
"""Height of a curve's name, in inches."""
ABOVE, BELOW = 1.25, 0.55
"""Height of headline and axis, in inches."""


def draw(path: Path, results: list[Result], headline: tuple[str, str]) -> None:
    """Draws validation and training curves, each named at its end; for several seeds, means and ranges."""
    width, left_edge = 11, 0.05
    tall = max(3.4, LINE * (len(results) + 1))
    height = tall + ABOVE + BELOW
    figure = Figure(figsize=(width, height), dpi=160, facecolor="white")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1.6, 1))
    # Beside each panel there is room for the longest name with its loss, in inches.
    names = 0.09 * min(max([len(f"{result.label} 0.00") for result in results] or [10]), 30)
    right_edge, gap = 1 - (names + 0.15) / width, names + 0.6
    panel = ((right_edge - left_edge) * width - gap) / 2
    figure.subplots_adjust(
        left=left_edge, right=right_edge, top=1 - ABOVE / height, bottom=BELOW / height, wspace=gap / panel
    )
    figure.text(0.02, 1 - 0.29 / height, headline[0], fontsize=14, fontweight="bold", color=INK, va="center")
    figure.text(0.02, 1 - 0.6 / height, headline[1], fontsize=12, color=INK, va="center")
    styles = _styles([result.label for result in results])
    _panel(left, "Validation loss", results, "validation", styles, LINE / tall)
    _panel(right, "Training loss", results, "train", styles, LINE / tall)
    figure.savefig(path)


def _styles(labels: list[str]) -> list[tuple[str, Any]]:
    """Returns colour and dashes of each label, all different as long as there are enough."""
    named = {COLOURS[label] for label in labels if label in COLOURS}
    free = [colour for colour in dict.fromkeys((*SPARE, *COLOURS.values())) if colour not in named]
    spare = itertools.cycle(free or SPARE)
    used: dict[str, int] = {}
    styles = []
    for label in labels:
        colour = COLOURS.get(label) or next(spare)
        used[colour] = used.get(colour, 0) + 1
        styles.append((colour, DASHES[(used[colour] - 1) % len(DASHES)]))
    return styles


def _panel(
    axes: Any, title: str, results: list[Result], which: str, styles: list[tuple[str, Any]], line: float
) -> None:  # fmt: skip
    """Draws the curves called `which`; each name takes a share `line` of the height."""
    axes.set_title(title, loc="left", fontsize=12, color=INK, pad=10)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.grid(axis="y", color=FAINT, linewidth=0.7)
    axes.tick_params(length=0, labelsize=10, labelcolor="#555555")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("step", fontsize=10, color="#555555", loc="right")
    if not results:
        return
    curves = [getattr(result, which) for result in results]
    last = max(max(result.steps[-1] for result in results), 1)
    low, high = _range([result.steps for result in results], curves, last)
    axes.set_xlim(0, last)
    axes.set_ylim(low, high)
    order = {"plain": 2, "torch": 3}  # where they coincide, torch shows as dashes on plain
    ends = []
    for result, curve, (colour, dashes) in zip(results, curves, styles, strict=True):
        axes.plot(
            result.steps, curve, color=colour, linewidth=2.6 if result.label == "plain" else 1.8,
            linestyle=(0, (2, 2)) if result.label == "torch" else dashes, zorder=order.get(result.label, 4),
            marker="o" if len(curve) == 1 else None,
        )  # fmt: skip
        if len(result.runs) > 1:
            points = list(zip(*(getattr(record, which) for record in result.runs), strict=False))
            band = [min(point) for point in points], [max(point) for point in points]
            axes.fill_between(result.steps, *band, color=colour, alpha=0.13, linewidth=0, zorder=1)
        if which == "validation" and low <= curve[result.best] <= high:
            lowest = result.steps[result.best], curve[result.best]
            axes.plot(
                *lowest, "o", color=colour, markersize=6, markeredgecolor="white", zorder=5, clip_on=False
            )
        if math.isfinite(curve[-1]):
            ends.append((curve[-1], result.steps[-1], f"{result.label} {curve[-1]:.2f}", colour))
    _name_ends(axes, ends, last, low, high, line)
    if which == "validation":
        seeds = max(len(result.runs) for result in results)
        note = f"mean and range of {seeds} seeds    " if seeds > 1 else ""
        axes.set_title(
            f"{note}\N{BLACK CIRCLE} lowest point", loc="right", fontsize=9, color="#777777", pad=10
        )


def _range(steps: list[list[int]], curves: list[list[float]], last: int) -> tuple[float, float]:
    """Returns the range of losses that holds most of the curves after their first fall, and their ends.

    Curves far above the others leave the picture, or the others would be one line at its bottom.
    """
    late = []
    for at, curve in zip(steps, curves, strict=True):
        points = [(step, y) for step, y in zip(at, curve, strict=True) if math.isfinite(y)]
        if points:
            late.append([y for step, y in points if step >= 0.15 * last] or [y for _, y in points])
    if not late:
        return -0.1, 1.1
    low = min(map(min, late))
    usual = sorted(ys[-1] for ys in late)[math.ceil(0.75 * len(late)) - 1]
    inside = [ys for ys in late if ys[-1] <= usual + 2 * (usual - low)]
    values = sorted(y for ys in inside for y in ys)
    high = max(values[int(0.9 * (len(values) - 1))], *(ys[-1] for ys in inside))
    margin = 0.05 * (high - low) or 0.1
    return low - margin, high + margin


def _name_ends(
    axes: Any, ends: list[tuple[float, int, str, str]], last: int, low: float, high: float, line: float
) -> None:
    """Writes each name beside the end of its curve, and moves names apart that would overlap."""
    apart = line * (high - low)
    ends = sorted(ends)
    highest = max(high - apart * (len(ends) - 0.5), low + apart / 2)
    levels = _rising([min(max(y, low), high) - i * apart for i, (y, *_) in enumerate(ends)])
    heights = [min(max(level, low + apart / 2), highest) + i * apart for i, level in enumerate(levels)]
    for (y, step, name, colour), height in zip(ends, heights, strict=True):
        if step < last:  # stopped early
            beside: Any = {"xytext": (6, 0), "textcoords": "offset points"}
            axes.annotate(name, (step, y), va="center", fontsize=11, color=colour, **beside)
            continue
        across = {"transform": axes.get_yaxis_transform(), "clip_on": False}
        if y <= high:
            axes.plot((1, 1.035), (y, height), color=colour, linewidth=0.8, **across)
        else:
            name += " \N{UPWARDS ARROW}"
        axes.text(1.045, height, name, va="center", fontsize=11, color=colour, **across)


def _rising(values: list[float]) -> list[float]:
    """Returns the nearest values, in least squares, of which none is below the one before it."""
    blocks: list[tuple[float, int]] = []  # mean, count
    for value in values:
        blocks.append((value, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (b, n), (a, m) = blocks.pop(), blocks.pop()
            blocks.append(((a * m + b * n) / (m + n), m + n))
    return [mean for mean, count in blocks for _ in range(count)]
