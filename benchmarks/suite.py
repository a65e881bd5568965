"""Defines benchmark cases, and sets up, verifies and times their contenders.

    suite module ──cases(device, quick)──▶ cases ──measure──▶ results (plain data) ──▶ table, picture, JSON

A case is one workload and the contenders that run it.  Each contender is set up on the same workload.  Its
result is verified before it is timed, in turns with the others.  A contender whose result is wrong is not
timed: its row says what is wrong instead.
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
    """Raised where a contender or a case cannot run on this machine; the message says why."""


class Check(NamedTuple):
    """Comparison of a result with the expected one; it is wrong if the error is above the bound, or NaN."""

    what: str
    error: float
    bound: float

    @property
    def wrong(self) -> str | None:
        """Text to show instead of a timing, or `None` if the result is right."""
        return (
            None if self.error <= self.bound else f"{self.what} off by {self.error:.1e} (<= {self.bound:.1e})"
        )


class Case(abc.ABC):
    """One workload and the contenders that run it.

    Attributes:
        suite: Name of the module that defines it.
        name: The operation, its operands and their dtype, for the table.
        baseline: The contender that the others are compared with.
        bytes: Fewest bytes that a run must move; `None` where bandwidth does not matter.
        rounds: How often each contender is timed.
    """

    suite: str
    name: str
    baseline: str
    bytes: int | None = None
    rounds: int = 11

    @abc.abstractmethod
    def setup(self, device: torch.device) -> Any:
        """Returns the workload, which all contenders run.

        Raises:
            Unavailable: If it cannot be made on this machine.
        """

    def teardown(self, workload: Any) -> None:  # noqa: B027  (most have nothing to undo)
        """Undoes global changes that the setup made; by default there are none."""

    @abc.abstractmethod
    def contenders(self) -> dict[str, Callable[[Any], Run]]:
        """Returns the contenders by name: functions that make a run from the workload.

        A function may raise `Unavailable`.
        """

    @abc.abstractmethod
    def verify(self, name: str, workload: Any, run: Run) -> list[Check]:
        """Calls a contender's run and compares what it computes with what is expected."""

    def details(self, workload: Any, run: Run) -> dict[str, Any]:
        """Returns further fields of a contender's row; it is called after the run has been timed."""
        return {}

    def time(self, workload: Any, runs: dict[str, Run], clock: measure.Clock) -> dict[str, measure.Timing]:
        """Times the runs in turns, and returns their timings by name."""
        return measure.interleave(runs, self.rounds, clock)


Result = dict[str, Any]


def cases(suite: str, device: torch.device, quick: bool) -> list[Case]:
    """Returns the cases of a suite for a device; `quick` asks for fewer and smaller ones."""
    return importlib.import_module(f"{__package__}.{suite}").cases(device, quick)


def refused(results: Iterable[Result]) -> bool:
    """Returns whether any of fastreg's results is wrong."""
    return any("wrong" in row for r in results for name, row in r["rows"].items() if name.startswith(OURS))


def measured(case: Case, device: torch.device) -> tuple[Result, dict[str, measure.Timing]]:
    """Sets up, verifies and times the contenders of a case.

    Returns:
        The result for table, picture and JSON, and the rounds of each contender that was timed.
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
    """Returns a contender's verified run; otherwise `None`, and writes the reason into its row."""
    try:
        run = build(workload)
        checks = case.verify(name, workload, run)
    except Unavailable as reason:
        row["skipped"] = str(reason)
    except torch.OutOfMemoryError as error:
        row["skipped"] = f"out of memory: {str(error).splitlines()[0]}"
    except Exception as error:  # a library may fail in any way: measure the others all the same
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
