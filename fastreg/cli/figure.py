"""The curves of `fastreg compare` as a picture."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .results import Result

# Okabe & Ito, then Tol's muted: told apart with any colour vision. What the others are measured against is
# black and grey.
COLOURS = {
    "torch": "#9a9a9a", "plain": "#000000", "clip": "#56b4e9", "noise": "#e69f00",
    "ema": "#009e73", "decay": "#cc79a7", "all": "#d55e00",
    "swa": "#117733", "lookahead": "#0072b2", "sam": "#882255", "asam": "#aa4499", "msam": "#999933",
}  # fmt: skip
SPARE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
INK, FAINT = "#222222", "#dddddd"


def draw(path: Path, results: list[Result], headline: tuple[str, str]) -> None:
    """Draw validation and training curves, each named where it ends.

    Args:
        path: The PNG to write.
        results: What was trained.
        headline: Two lines above the panels.
    """
    width, left_edge = 11, 0.05
    figure = Figure(figsize=(width, 5.2), dpi=160, facecolor="white")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1.6, 1))
    # Beside each panel there is room for the longest name with its loss, in inches.
    names = 0.09 * min(max([len(f"{result.label} 0.00") for result in results] or [10]), 30)
    right_edge, gap = 1 - (names + 0.15) / width, names + 0.6
    panel = ((right_edge - left_edge) * width - gap) / 2
    figure.subplots_adjust(left=left_edge, right=right_edge, top=0.76, bottom=0.1, wspace=gap / panel)
    figure.text(0.02, 0.945, headline[0], fontsize=14, fontweight="bold", color=INK, va="center")
    figure.text(0.02, 0.885, headline[1], fontsize=12, color=INK, va="center")
    colours = _colours([result.label for result in results])
    _panel(left, "Validation loss", results, [result.validation for result in results], colours, dots=True)
    _panel(right, "Training loss", results, [result.train for result in results], colours, dots=False)
    figure.savefig(path)


def _colours(labels: list[str]) -> list[str]:
    named = {COLOURS[label] for label in labels if label in COLOURS}
    free = [colour for colour in (*SPARE, *COLOURS.values()) if colour not in named]
    spare = itertools.cycle(dict.fromkeys(free) or SPARE)
    return [COLOURS.get(label) or next(spare) for label in labels]


def _panel(
    axes: Any, title: str, results: list[Result], curves: list[list[float]], colours: list[str], dots: bool
) -> None:  # fmt: skip
    axes.set_title(title, loc="left", fontsize=12, color=INK, pad=10)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.grid(axis="y", color=FAINT, linewidth=0.7)
    axes.tick_params(length=0, labelsize=10, labelcolor="#555555")
    axes.set_xlabel("step", fontsize=10, color="#555555", loc="right")
    if not results:
        return
    last = max(max(result.steps[-1] for result in results), 1)
    low, high = _range(results, curves, last)
    axes.set_xlim(0, last)
    axes.set_ylim(low, high)
    order = {"plain": 2, "torch": 3}  # where they coincide, torch shows as dashes on plain
    ends = []
    for result, curve, colour in zip(results, curves, colours, strict=True):
        axes.plot(
            result.steps, curve, color=colour, linewidth=2.6 if result.label == "plain" else 1.9,
            linestyle=(0, (2, 2)) if result.label == "torch" else "-", zorder=order.get(result.label, 4),
            solid_capstyle="round", marker="o" if len(curve) == 1 else None,
        )  # fmt: skip
        if dots and low <= curve[result.best] <= high:
            lowest = result.steps[result.best], curve[result.best]
            axes.plot(
                *lowest, "o", color=colour, markersize=6, markeredgecolor="white", zorder=5, clip_on=False
            )
        if math.isfinite(curve[-1]):
            ends.append((curve[-1], result.steps[-1], f"{result.label} {curve[-1]:.2f}", colour))
    _name_ends(axes, ends, last, low, high)
    if dots:
        axes.set_title("\N{BLACK CIRCLE} lowest point", loc="right", fontsize=9, color="#777777", pad=10)


def _range(results: list[Result], curves: list[list[float]], last: int) -> tuple[float, float]:
    """All that happens after the first fall of the loss."""
    points = [
        (step, y)
        for result, curve in zip(results, curves, strict=True)
        for step, y in zip(result.steps, curve, strict=True)
        if math.isfinite(y)
    ]
    late = [y for step, y in points if step >= 0.15 * last] or [y for _, y in points] or [0.0, 1.0]
    margin = 0.05 * (max(late) - min(late)) or 0.1
    return min(late) - margin, max(late) + margin


def _name_ends(
    axes: Any, ends: list[tuple[float, int, str, str]], last: int, low: float, high: float
) -> None:
    """Write each name beside the end of its curve, moved apart where they would overlap."""
    apart = 0.06 * (high - low)
    ends = sorted(ends)
    places = [min(max(y, low), high) for y, *_ in ends]
    for _ in range(200):
        places[:1] = [max(place, low + apart / 2) for place in places[:1]]
        for i in range(len(places) - 1):
            if (overlap := apart - (places[i + 1] - places[i])) > 1e-9 * apart:
                places[i] -= overlap / 2
                places[i + 1] += overlap / 2
    for (y, step, name, colour), place in zip(ends, places, strict=True):
        if step < last:  # stopped early
            beside: Any = {"xytext": (6, 0), "textcoords": "offset points"}
            axes.annotate(name, (step, y), va="center", fontsize=11, color=colour, **beside)
            continue
        across = {"transform": axes.get_yaxis_transform(), "clip_on": False}
        axes.plot((1, 1.035), (y, place), color=colour, linewidth=0.8, **across)
        axes.text(1.045, place, name, va="center", fontsize=11, color=colour, **across)
