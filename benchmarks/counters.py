"""Reads hardware counters of five kernels by Nsight Compute: bandwidth, issue slots, sectors per request."""

from __future__ import annotations

import csv
import functools
import io
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch

from . import tune
from .ledger import Ledger, Row, failed

RUNS: dict[str, tuple[str, tune.Make]] = {
    "norm": ("norm_kernel", tune._norm),
    "step, AdamW fp32": ("step_kernel", functools.partial(tune._step, "AdamW", "fp32")),
    "dropout, 256 M bf16": ("dropout_kernel", functools.partial(tune._dropout, True)),
    "noise, 256 M bf16": ("noise_kernel", tune._noise),
    "ghost norms bf16": ("ghost_sums_kernel", functools.partial(tune._ghost, torch.bfloat16)),
}
"""The name of the kernel to measure and the workload that launches it, by row."""
METRICS = {
    "gpu__time_duration.sum": "nanoseconds",
    "dram__bytes.sum.per_second": "bytes_per_second",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "of_peak_bandwidth",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "issue_slots_used",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps_active",
    "l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_ld.ratio": "sectors_per_load",
    "l1tex__average_t_sectors_per_request_pipe_lsu_mem_global_op_st.ratio": "sectors_per_store",
}
"""Names of the metrics in ncu, and in a row; shares are percentages."""


def run(ledger: Ledger, where: str, dry: bool) -> bool:
    """Measures all kernels; returns whether ncu has reported every one.

    A dry run launches the kernels and measures nothing.
    """
    if dry:
        launch(where, dry)
        ledger.add("dry", {"launched": list(RUNS)})
        return True
    if shutil.which("ncu") is None:
        raise RuntimeError("Nsight Compute is not installed: there is no ncu on the path")
    if names := ledger.pending(RUNS):
        command = ["ncu", "--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none"]
        command += ["--profile-from-start", "off", "--target-processes", "all"]
        command += ["--metrics", ",".join(METRICS), sys.executable, "-m", __name__, where]
        done = subprocess.run(command, capture_output=True, text=True)
        measured = parsed(done.stdout)
        for name in names:
            row = measured.get(RUNS[name][0])
            ledger.add(
                name, row or {"failed": f"ncu told nothing of it: {(done.stderr or done.stdout)[-500:]}"}
            )
            print(f"{name}: {ledger.rows[name]}", flush=True)
    return not any(map(failed, ledger.rows.values()))


def launch(where: str, dry: bool) -> None:
    """Runs every workload once to warm up, then once while the profiler records."""
    runs: list[Callable[[], Any]] = [make(torch.device(where), dry)[0] for _, make in RUNS.values()]
    for run in runs:
        run()
    if not dry:
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
    for run in runs:
        run()
    if not dry:
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def parsed(text: str) -> dict[str, Row]:
    """Returns a row for the last launch of each kernel, from ncu's output: other lines, then CSV."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    rows: dict[str, Row] = {}
    for row in csv.DictReader(io.StringIO("\n".join(lines[start:]))):
        if row["ID"]:  # the first row holds the units
            values = {METRICS[name]: row[name] for name in METRICS if row.get(name)}
            rows[row["Kernel Name"].split("(")[0]] = {name: _number(value) for name, value in values.items()}
    return rows


def _number(text: str) -> float | str:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return text


if __name__ == "__main__":
    launch(sys.argv[1], dry=False)
