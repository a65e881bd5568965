"""What a benchmark is, and how all of them are measured: set up, verify, run.

    suite module ──cases(device, quick)──▶ cases ──measure──▶ results (plain data) ──▶ table, picture, JSON

A case is one workload and the contenders that run it.  Each contender is set up on the same workload, its
result is verified, and only then is it timed, in turns with the others.  A result that is wrong prints no
number: its row says what is wrong instead.
"""

from __future__ import annotations

import abc
import gc
import importlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from . import measure
from .measure import Run

OURS = "fastreg"


class Unavailable(Exception):
    """A contender or a case that cannot run here; the message says why."""


class Check(NamedTuple):
    """How far a result is off; it is wrong where the error is above the bound, or no number."""

    what: str
    error: float
    bound: float

    @property
    def wrong(self) -> str | None:
        """What to print instead of a number."""
        return (
            None if self.error <= self.bound else f"{self.what} off by {self.error:.1e} (<= {self.bound:.1e})"
        )


class Case(abc.ABC):
    """One workload and who runs it.

    Attributes:
        suite: The module it stands in.
        name: What is done, to what, in which dtype.
        baseline: The contender that the others are compared with.
        bytes: What must be moved at least; `None` where bandwidth is not the point.
        rounds: How often each contender is timed.
    """

    suite: str
    name: str
    baseline: str
    bytes: int | None = None
    rounds: int = 11

    @abc.abstractmethod
    def setup(self, device: torch.device) -> Any:
        """The workload.

        Raises:
            Unavailable: If it cannot be had here.
        """

    def teardown(self, workload: Any) -> None:  # noqa: B027  (most have nothing to undo)
        """Undo what the setup did to others."""

    @abc.abstractmethod
    def contenders(self) -> dict[str, Callable[[Any], Run]]:
        """What makes each contender's run from the workload; it may raise `Unavailable`."""

    @abc.abstractmethod
    def verify(self, name: str, workload: Any, run: Run) -> list[Check]:
        """How far what a contender's run computes is off, and how far it may be."""

    def details(self, workload: Any, run: Run) -> dict[str, Any]:
        """What else a row tells of a run, after it has been timed."""
        return {}

    def time(self, workload: Any, runs: dict[str, Run], clock: measure.Clock) -> dict[str, measure.Timing]:
        """Time the runs."""
        return measure.interleave(runs, self.rounds, clock)


Result = dict[str, Any]


def cases(suite: str, device: torch.device, quick: bool) -> list[Case]:
    """The cases of a suite for a device."""
    return importlib.import_module(f"{__package__}.{suite}").cases(device, quick)


def refused(results: Iterable[Result]) -> bool:
    """Whether any result of ours is wrong."""
    return any("wrong" in row for r in results for name, row in r["rows"].items() if name.startswith(OURS))


def measured(case: Case, device: torch.device) -> tuple[Result, dict[str, measure.Timing]]:
    """Set up, verify and time the contenders of a case.

    Returns:
        The result for table, picture and JSON, and the single rounds of those who were timed.
    """
    timings: dict[str, measure.Timing] = {}
    result: Result = {
        "suite": case.suite, "case": case.name, "baseline": case.baseline, "bytes": case.bytes,
        "rounds": case.rounds, "rows": {},
    }  # fmt: skip
    clock = measure.Clock(device)
    rows, runs, workload = result["rows"], {}, None
    try:
        try:
            workload = case.setup(device)
        except Unavailable as reason:
            return result | {"skipped": str(reason)}, timings
        for name, build in case.contenders().items():
            rows[name] = {}
            run = _prepared(case, name, build, workload, rows[name])
            if run is not None:
                runs[name] = run
            run = None
        if runs:
            timings = _time(case, workload, runs, rows, result, clock)
    finally:
        if workload is not None:
            case.teardown(workload)
        del runs, workload
        gc.collect()
        torch._dynamo.reset()
    return result, timings


def _prepared(
    case: Case, name: str, build: Callable[[Any], Run], workload: Any, row: dict[str, Any]
) -> Run | None:
    """A contender's run, verified; `None` where the row says why there is none."""
    try:
        run = build(workload)
        checks = case.verify(name, workload, run)
    except Unavailable as reason:
        row["skipped"] = str(reason)
    except torch.OutOfMemoryError as error:
        row["skipped"] = f"out of memory: {str(error).splitlines()[0]}"
    except Exception as error:  # a peer may fail in any way: the others are measured all the same
        row["wrong"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    else:
        row["errors"] = {check.what: check.error for check in checks}
        wrong = next((check.wrong for check in checks if check.wrong), None)
        if wrong is None:
            return run
        row["wrong"] = wrong
    return None


def _time(
    case: Case, workload: Any, runs: dict[str, Run], rows: Any, result: Result, clock: measure.Clock
) -> dict[str, measure.Timing]:  # fmt: skip
    timed = dict(runs)
    if case.bytes:
        timed["copy"] = measure.copy(clock.device)
    result["clocks"] = measure.clocks(clock.device)
    timings = case.time(workload, timed, clock)
    if case.bytes:
        copied = measure.quantiles(timings.pop("copy").seconds, 1)["median"]
        result["copy_gbps"] = 2 * measure.COPIED / copied / 1e9
    for name, timing in timings.items():
        row = rows[name]
        row["ms"] = measure.quantiles(timing.seconds)
        if timing.host:
            row["host_ms"] = measure.quantiles(timing.host)
        if case.baseline in timings:
            row["ratio"] = measure.ratio(timing, timings[case.baseline])
        if case.bytes:
            row["gbps"] = case.bytes / row["ms"]["median"] / 1e6
            row["temporary_bytes"] = measure.temporary_bytes(runs[name], clock.device)
        row |= case.details(workload, runs[name])
    return timings
