"""The suite of private steps: results are verified, and memory is the same at every call."""

import pytest
import torch

from fastreg_benchmarks import privacy, suite

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings("default")  # those of Opacus are its own


def test_every_step_is_right_and_ours_takes_least_memory():
    (case,) = privacy.cases(CPU, quick=True)
    case.rounds = 1
    result, _ = suite.measured(case, CPU)
    rows = result["rows"]
    assert all("ms" in row for row in rows.values()), rows
    peaks = {name: row["peak_bytes"] for name, row in rows.items()}
    assert peaks["fastreg"] < min(peaks["Opacus hooks"], peaks["Opacus ghost"])
    assert peaks["fastreg"] <= 1.1 * peaks[privacy.BASELINE]


def test_peak_is_that_of_all_tensors_together():
    def run():
        a = torch.ones(1000)
        b = a + 1
        del a
        return (b * 2).sum()

    peak = privacy.peak_bytes(run, CPU)
    assert 8000 <= peak < 8100  # scalars, too
    assert privacy.peak_bytes(run, CPU) == peak


def test_sums_that_are_not_clipped_are_noticed(monkeypatch):
    (case,) = privacy.cases(CPU, quick=True)
    workload = case.setup(CPU)
    monkeypatch.setattr(privacy, "MAX_NORM", 2.0)
    (check,) = case.verify("fastreg", workload, privacy.ours(workload))
    assert check.wrong
