"""Draws results as a picture: bars of speed-up, and the bandwidth reached against that of a copy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from . import report

# Palette of Okabe & Ito: it can be told apart with any colour vision.
COLOURS = {
    "fastreg": "#d55e00", "clip + torch fused": "#444444", "torch fused": "#444444",
    "grad_scale + fused": "#0072b2", "torch.compile": "#009e73", "torch foreach": "#a8a8a8",
    "optimi": "#cc79a7", "flashoptim": "#e69f00", "pytorch_optimizer": "#56b4e9",
}  # fmt: skip
INK, FAINT = "#222222", "#dddddd"
ROW = 0.19  # height of a line in inches


def draw(path: Path, run: dict[str, Any]) -> None:
    """Draws every result of a run that has times.

    Args:
        path: The PNG to write.
        run: The JSON document of the run.
    """
    groups = [(result, _timed(result)) for result in run["results"]]
    groups = [(result, rows) for result, rows in groups if rows]
    lines = sum(len(rows) + 2 for _, rows in groups)
    height = max(ROW * lines, 1.0)
    figure = Figure(figsize=(11, height + 1.35), dpi=120, facecolor="white")
    FigureCanvasAgg(figure)
    top, bottom = 1 - 0.85 / (height + 1.35), 0.4 / (height + 1.35)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1.25, 1))
    figure.subplots_adjust(left=0.215, right=0.97, top=top, bottom=bottom, wspace=0.08)
    figure.text(
        0.02, 1 - 0.25 / (height + 1.35), report.machine_line(run), fontsize=12, fontweight="bold",
        color=INK, va="center",
    )  # fmt: skip
    _prepare(left, "times faster than the baseline (1)")
    _prepare(right, "GB/s that had to move; the line is a copy")
    y, ticks, names = 0.0, [], []
    for result, rows in groups:
        left.text(
            0.0, y, result["case"], transform=left.get_yaxis_transform(), fontsize=9.5, fontweight="bold",
            color=INK, va="center",
        )  # fmt: skip
        first = y + 1
        for name, row in rows:
            y += 1
            ticks.append(y)
            names.append(name)
            _bar(left, y, name, row)
            if "gbps" in row:
                right.plot(row["gbps"], y, "o", color=_colour(name), markersize=5.5, clip_on=False)
        if "copy_gbps" in result:
            right.plot([result["copy_gbps"]] * 2, [first - 0.5, y + 0.5], color=INK, linewidth=1.4)
        y += 2
    left.set_yticks(ticks, names, fontsize=9, color="#444444")
    left.set_ylim(max(y - 0.8, 1), -0.8)
    ratios = [row["ratio"]["median"] for _, rows in groups for _, row in rows if "ratio" in row] or [1.0]
    low, high = min([*ratios, 0.5]), max([*ratios, 2.0])
    margin = (high / low) ** 0.12  # room for the labels, as a share of the width
    left.set_xlim(low / margin, high * margin)
    right.set_xlim(left=0)
    figure.savefig(path)


def _timed(result: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [(name, row) for name, row in result["rows"].items() if "ms" in row]


def _prepare(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10.5, color=INK, pad=8)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.grid(axis="x", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=9, labelcolor="#555555")


def _bar(axes: Any, y: float, name: str, row: dict[str, Any]) -> None:
    """Draws a bar from 1 to the ratio on a logarithmic scale, labelled with its value."""
    axes.set_xscale("log")
    ticks = (0.1, 0.2, 0.5, 1, 2, 5)
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
    axes.set_xticks([], minor=True)
    if "ratio" not in row:
        return
    value = row["ratio"]["median"]
    axes.barh(y, value - 1, left=1, height=0.72, color=_colour(name))
    faster = value >= 1
    axes.annotate(
        f"{value:.2f}", (value, y), xytext=(4 if faster else -4, 0), textcoords="offset points", va="center",
        ha="left" if faster else "right", fontsize=8.5, color=INK,
    )  # fmt: skip


def _colour(name: str) -> str:
    return COLOURS.get(name) or COLOURS.get(name.split(" ")[0]) or COLOURS["torch fused"]
