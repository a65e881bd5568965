"""Times contenders in turns, summarizes timings by median and quantiles, and describes the machine.

On a GPU the times of device and host are measured separately.  The device is timed by events behind a pause
that is longer than the host needs to enqueue all work.  The host is timed while the device is idle.
"""

from __future__ import annotations

import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from fastreg.cli.measure import PeakMemory
from fastreg.common.versions import installed_version

Run = Callable[[], Any]

PACKAGES = ("torch", "triton", "transformers", "pytest-benchmark")
PEERS = ("torch-optimi", "pytorch-optimizer", "flashoptim")
COPIED = 2**28
"""Bytes that the copy reads, and as many that it writes: several times the size of a cache."""


@dataclass
class Timing:
    """Seconds that one contender takes, a value for each round."""

    seconds: list[float] = field(default_factory=list)  # of the GPU if there is one, otherwise wall time
    host: list[float] = field(default_factory=list)  # until the call returns, on an idle GPU


class Clock:
    """A clock for calls on a device, which waits for the work of each."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        self._longest = 1e-3  # most seconds that the host has taken for a call

    def wait(self) -> None:
        """Waits until the device has done all its queued work."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def wall(self, run: Run) -> float:
        """Returns the seconds from a call until its work on the device is done."""
        self.wait()
        start = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - start

    def take(self, run: Run, timing: Timing) -> None:
        """Adds one round to a timing.

        On a GPU it calls the run twice: once for the host's time, once for the device's.
        """
        if not self.cuda:
            timing.seconds.append(self.wall(run))
            return
        self.wait()
        start = time.perf_counter()
        run()
        host = time.perf_counter() - start
        timing.host.append(host)
        self._longest = max(self._longest, host)
        self.wait()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(3e9 * self._longest))  # cycles: at 2 GHz half as long again as the host needs
        begin.record()
        run()
        end.record()
        self.wait()
        timing.seconds.append(begin.elapsed_time(end) / 1e3)


def interleave(runs: dict[str, Run], rounds: int, clock: Clock, warmup: int = 1) -> dict[str, Timing]:
    """Times each contender once per round, in an order that rotates; returns the timings by name."""
    timings = {name: Timing() for name in runs}
    names = list(runs)
    for turn in range(-warmup, rounds):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            clock.take(runs[name], timings[name] if turn >= 0 else Timing())
    return timings


def quantiles(values: list[float], unit: float = 1e3) -> dict[str, float]:
    """Returns the median and the 20 % and 80 % quantiles of seconds, in milliseconds by default."""
    cuts = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else values * 2
    summary = {"median": statistics.median(values), "q20": cuts[0], "q80": cuts[-1]}
    return {name: value * unit for name, value in summary.items()}


def ratio(run: Timing, baseline: Timing) -> dict[str, float]:
    """Returns how many times faster a run is than the baseline.

    The median is the ratio of medians; the quantiles are those of the ratios within rounds.
    """
    paired = quantiles([b / r for r, b in zip(run.seconds, baseline.seconds, strict=True)], 1)
    return paired | {"median": statistics.median(baseline.seconds) / statistics.median(run.seconds)}


def temporary_bytes(run: Run, device: torch.device) -> int | None:
    """Returns the bytes of memory that a call takes at its peak beyond those held before it.

    It is `None` where the system does not report them.
    """
    memory = PeakMemory(device)
    run()
    memory.reset()
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else _resident()
    run()
    peak = memory.bytes()
    return None if peak is None or before is None else max(0, peak - before)


def _resident() -> int | None:
    try:
        with open("/proc/self/status") as file:
            return int(re.search(r"VmRSS:\s+(\d+) kB", file.read())[1]) * 1024
    except OSError:
        return None


def copy(device: torch.device) -> Run:
    """Returns the copy that bandwidths are compared with: a call reads and writes `COPIED` bytes each."""
    source, target = (torch.zeros(COPIED // 4, device=device) for _ in range(2))
    return lambda: target.copy_(source)


def free_memory(device: torch.device) -> int:
    """Returns the bytes that can still be allocated; 8 GiB if the system does not report them."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            return int(re.search(r"MemAvailable:\s+(\d+) kB", file.read())[1]) * 1024
    except OSError:
        return 8 * 2**30


def machine(device: torch.device) -> dict[str, Any]:
    """Returns facts about the machine for the JSON file: device, processor, load, and versions."""
    facts: dict[str, Any] = {
        "device": _processor(),
        "threads": torch.get_num_threads(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,  # at the start
        "system": platform.system(),
        "wheel_cuda": torch.version.cuda or torch.version.hip,  # torch launches differently from 13 on
        "versions": {"python": platform.python_version()}
        | {name: installed_version(name) for name in (*PACKAGES, *PEERS)},
    }
    if device.type == "cuda":
        facts |= {
            "processor": facts["device"],
            "device": torch.cuda.get_device_name(device),
            "capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
            "multiprocessors": torch.cuda.get_device_properties(device).multi_processor_count,
        }
    return facts


def clocks(device: torch.device) -> str | None:
    """Returns the present clock rates as text, or `None` if the system does not report them."""
    if device.type == "cuda":
        query = "clocks.sm,clocks.mem,clocks.max.sm,driver_version,power.limit"
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv", f"--id={device.index or 0}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            return None
        names, *values = [line.split(", ") for line in done.stdout.strip().splitlines()] or [[]]
        return ", ".join(map(" ".join, zip(names, values[0], strict=True))) if values else None
    try:
        with open("/proc/cpuinfo") as file:
            rates = [float(line.split(":")[1]) for line in file if line.startswith("cpu MHz")]
    except OSError:
        return None
    return f"{min(rates):.0f}-{max(rates):.0f} MHz" if rates else None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
