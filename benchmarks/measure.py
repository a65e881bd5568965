"""Timings that can be believed: contenders take turns, medians are reported."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Timing:
    """Seconds of one contender over all rounds."""

    name: str
    seconds: list[float] = field(default_factory=list)

    def quantiles(self) -> dict[str, float]:
        """Median and 20/80 quantiles in milliseconds."""
        cuts = statistics.quantiles(self.seconds, n=5, method="inclusive")
        values = {"median": statistics.median(self.seconds), "q20": cuts[0], "q80": cuts[-1]}
        return {name: value * 1e3 for name, value in values.items()}


def interleave(contenders: dict[str, Callable[[], Any]], rounds: int, warmup: int = 2) -> dict[str, Timing]:
    """Time every contender once per round, in an order that turns with the rounds."""
    timings = {name: Timing(name) for name in contenders}
    names = list(contenders)
    for turn in range(-warmup, rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            start = time.perf_counter()
            contenders[name]()
            if turn >= 0:
                timings[name].seconds.append(time.perf_counter() - start)
    return timings


def ratio(ours: Timing, baseline: Timing) -> dict[str, float]:
    """How many times faster we are: ratio of medians, and quantiles of the ratios within rounds."""
    paired = [b / o for o, b in zip(ours.seconds, baseline.seconds, strict=True)]
    cuts = statistics.quantiles(paired, n=5, method="inclusive")
    return {
        "median": statistics.median(baseline.seconds) / statistics.median(ours.seconds),
        "q20": cuts[0], "q80": cuts[-1],
    }  # fmt: skip


@dataclass
class Machine:
    """Where a measurement was taken."""

    processor: str
    threads: int
    instruction_set: str
    torch: str
    python: str
    load: float  # of other processes, at the start


def machine() -> Machine:
    """This machine."""
    return Machine(
        _processor(), torch.get_num_threads(), torch.backends.cpu.get_cpu_capability(), torch.__version__,
        platform.python_version(), os.getloadavg()[0],
    )  # fmt: skip


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
