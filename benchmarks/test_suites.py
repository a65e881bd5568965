"""Runs the suites under pytest-benchmark: a row for each contender, grouped by case.

    pytest benchmarks --quick --benchmark-columns=median,iqr,rounds -k "clip and fp32"

All contenders of a case are timed in turns before the first is reported.  pytest-benchmark then reads a
clock that replays the measured times.  A contender whose result is wrong fails and has no row.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest

from fastreg.cli.usage import device
from fastreg_benchmarks import SUITES, suite

pytestmark = pytest.mark.filterwarnings("default")  # other libraries' warnings are no errors


class Replay:
    """A clock that each call of `run` advances by the next of the measured durations."""

    def __init__(self) -> None:
        self.now = 0.0
        self.durations: Iterator[float] = iter(())

    def read(self) -> float:
        """Returns the sum of the durations so far, in seconds."""
        return self.now

    def run(self) -> None:
        """Advances the clock by a duration; pytest-benchmark times this call."""
        self.now += next(self.durations)


CLOCK = Replay()
measured = functools.cache(suite.measured)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    where = device(metafunc.config.getoption("--device") or None)
    cases = [
        case for name in SUITES for case in suite.cases(name, where, metafunc.config.getoption("--quick"))
    ]
    rows = [(case, contender) for case in cases for contender in case.contenders()]
    names = [f"{case.name}: {contender}" for case, contender in rows]
    metafunc.parametrize("case, contender, where", [(*row, where) for row in rows], ids=names)


@pytest.mark.benchmark(timer=CLOCK.read)
def test_speed(case: suite.Case, contender: str, where: Any, benchmark: Any) -> None:
    """Measures the case unless that has been done, and reports the contender."""
    result, timings = measured(case, where)
    row = result["rows"].get(contender, {})
    if reason := result.get("skipped") or row.get("skipped"):
        benchmark.skipped = True
        pytest.skip(reason)
    assert "wrong" not in row, row["wrong"]
    benchmark.group = result["case"]
    benchmark.extra_info |= {key: row[key] for key in row.keys() - {"ms"}}
    CLOCK.durations = iter(timings[contender].seconds)
    benchmark.pedantic(CLOCK.run, rounds=len(timings[contender].seconds))
