"""Formats results of the suites as tables, for a terminal and for Markdown."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from . import measure
from .suite import OURS, Result

Cell = Callable[[Result, dict[str, Any]], str]
REFUSED = "refused"
UNITS = {
    "ms": "milliseconds, median and 20/80 % quantiles; on a GPU those of the device",
    "host_ms": "until the call returns, on an idle GPU",
    "ratio": "times faster than the baseline: ratio of medians, quantiles of the ratios within rounds",
    "gbps": "bytes that must move over the median, in 1e9 bytes per second",
    "first_ms": "the first step, with compilation where caches did not have it",
    "temporary_bytes": "peak of a step above what is held before it",
    "saved_bytes": "kept for the backward pass, besides what comes in",
    "peak_bytes": "memory of tensors at the peak of a training step beyond what is held between steps",
    "errors": "largest difference from the judge, relative to the largest value",
}


def document(device: torch.device, quick: bool) -> dict[str, Any]:
    """Returns the JSON document of a new run, without results yet."""
    return {
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "quick": quick,
        "machine": measure.machine(device),
        "units": UNITS,
        "results": [],
    }


def duration(milliseconds: float) -> str:
    """Returns a time as text, with three digits, in s, ms or µs."""
    for unit, scale in (("s", 1e-3), ("ms", 1.0), ("µs", 1e3)):
        if milliseconds * scale >= 1 or unit == "µs":
            value = milliseconds * scale
            return f"{value:.{max(0, 2 - math.floor(math.log10(max(value, 1))))}f} {unit}"
    raise AssertionError


def _spread(result: Result, row: dict[str, Any]) -> str:
    if "ratio" not in row or result["baseline"] == row["name"]:
        return ""
    return "{q20:.2f}\N{EN DASH}{q80:.2f}".format(**row["ratio"])


def _optional(key: str, show: Callable[[Result, Any], str]) -> Cell:
    return lambda result, row: show(result, row[key]) if row.get(key) is not None else ""


def share(result: Result, row: dict[str, Any]) -> float:
    """Returns the optimizer's share of the time of a training step, from 0 to 1.

    Forward and backward pass are the same for all rows, but vary by more than optimizers differ, so their
    time is the median over the rows.
    """
    rest = [
        other["ms"]["median"] - other["optimizer_ms"]["median"]
        for other in result["rows"].values()
        if "optimizer_ms" in other
    ]
    ours = row["optimizer_ms"]["median"]
    return ours / (ours + statistics.median(rest))


COLUMNS: dict[str, Cell] = {
    "": lambda result, row: row["name"],
    "time": lambda result, row: duration(row["ms"]["median"]) if "ms" in row else REFUSED,
    "times faster": _optional("ratio", lambda _, value: f"{value['median']:.2f}"),
    "20\N{EN DASH}80\N{NO-BREAK SPACE}%": _spread,
    "host time": _optional("host_ms", lambda _, value: duration(value["median"])),
    "GB/s": _optional("gbps", lambda _, value: f"{value:.0f}"),
    "of copy": _optional("gbps", lambda result, value: f"{value / result['copy_gbps']:.0%}"),
    "extra MiB": _optional("temporary_bytes", lambda _, value: f"{value / 2**20:.0f}"),
    "saved MiB": _optional("saved_bytes", lambda _, value: f"{value / 2**20:.1f}"),
    "peak MiB": _optional("peak_bytes", lambda _, value: f"{value / 2**20:.0f}"),
    "first step": _optional("first_ms", lambda _, value: duration(value)),
    "per tensor": lambda _, row: (
        duration(row["ms"]["median"] / row["tensors"]) if row.get("tensors") and "ms" in row else ""
    ),
    "optimizer": _optional("optimizer_ms", lambda _, value: duration(value["median"])),
    "share": lambda result, row: f"{share(result, row):.1%}" if "optimizer_ms" in row else "",
}


def table(result: Result) -> tuple[list[str], list[list[str]]]:
    """Returns headings and rows of the contenders that were timed or refused, without empty columns."""
    rows = [row | {"name": name} for name, row in result["rows"].items() if "skipped" not in row]
    cells = [[cell(result, row) for cell in COLUMNS.values()] for row in rows]
    used = [i for i in range(len(COLUMNS)) if i == 0 or any(row[i] for row in cells)]
    headings = list(COLUMNS)
    return [headings[i] for i in used], [[row[i] for i in used] for row in cells]


def notes(results: Iterable[Result]) -> list[str]:
    """Returns notes on everything refused or left out, with reasons; several cases may share a note."""
    said: dict[str, list[str]] = {}
    for result in results:
        if "skipped" in result:
            said.setdefault(f"left out: {result['skipped']}", []).append(result["case"])
        for name, row in result["rows"].items():
            if "wrong" in row:
                said.setdefault(f"{name} refused: {row['wrong']}", []).append(result["case"])
            elif "skipped" in row:
                said.setdefault(f"{name} left out: {row['skipped']}", [])
    return [f"{note} ({'; '.join(cases)})" if cases else note for note, cases in said.items()]


def heading(result: Result) -> str:
    """Returns the name of a case, with the bytes to move and the bandwidth of a copy if it has them."""
    if "copy_gbps" not in result:
        return result["case"]
    return f"{result['case']}: {result['bytes'] / 1e9:.2f} GB to move, copy at {result['copy_gbps']:.0f} GB/s"


def markdown(headings: list[str], rows: list[list[str]]) -> str:
    """Returns a Markdown table, all but the first column aligned to the right."""
    lines = [headings, ["---", *["---:"] * (len(headings) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def show(console: Any, result: Result) -> None:
    """Prints the table of a result on a console of rich, unless the case was skipped."""
    from rich import box
    from rich.table import Table

    if "skipped" in result:
        return
    headings, rows = table(result)
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for i, name in enumerate(headings):
        shown.add_column(name.replace(" ", "\n"), justify="right" if i else "left", no_wrap=True)
    for row in rows:
        bold = "bold" if row[0].startswith(OURS) else None
        shown.add_row(
            *row,
            style="red" if REFUSED in row else bold,
        )
    console.print(f"[bold]{heading(result)}[/]", highlight=False)
    console.print(shown, highlight=False)


def machine_line(run: dict[str, Any]) -> str:
    """Returns the device and the versions of a run, in one line."""
    machine, versions = run["machine"], run["machine"]["versions"]
    parts = [machine["device"]]
    if "multiprocessors" in machine:
        parts.append(f"torch for CUDA {machine['wheel_cuda']}")
    else:
        parts += [f"{machine['threads']} threads", machine["instruction_set"]]
    parts += [f"{name} {versions[name]}" for name in ("torch", "triton") if versions[name]]
    return ", ".join(parts)
