"""Measures time and memory of a training run."""

from __future__ import annotations

import gc
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch


class Stopwatch:
    """Adds up the seconds spent in `with watch:`; on a GPU it waits for the device at both ends."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._seconds, self._begin = device, 0.0, 0.0

    def __enter__(self) -> Stopwatch:
        self._wait()
        self._begin = time.perf_counter()
        return self

    def __exit__(self, *_: Any) -> None:
        self._wait()
        self._seconds += time.perf_counter() - self._begin

    def take(self) -> float:
        """Returns the seconds in all blocks since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class PeakMemory:
    """Peak memory since `reset`, by the best method of the system, which `method` names."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            self.method = "peak GPU memory in each run (torch.cuda.max_memory_allocated)"
        elif _clear_peak():
            self.method = "peak resident memory of the process in each run (VmHWM)"
        else:
            self.method = "peak resident memory of the process since its start (ru_maxrss)"

    def reset(self) -> None:
        """Starts a new measurement of the peak."""
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            _clear_peak()

    def bytes(self) -> int | None:
        """Returns the peak in bytes; `None` where the system does not report it."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        if "VmHWM" in self.method:
            match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
            return int(match[1]) * 1024 if match else None
        try:
            import resource
        except ImportError:  # Windows
            return None
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _clear_peak() -> bool:
    """Asks Linux to forget the peak so far, and returns whether it does."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True
